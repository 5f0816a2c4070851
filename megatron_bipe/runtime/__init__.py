"""The process itself: what it starts, and what started it."""
