"""Estimates before a run: memory, communication, goodput, and the text of `--dry-run`."""
