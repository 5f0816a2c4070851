"""SCROLLS: seven tasks of summaries and questions over long texts."""
