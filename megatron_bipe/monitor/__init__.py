"""Runs seen from outside their processes: `history` reads a run folder, the other modules show it."""
