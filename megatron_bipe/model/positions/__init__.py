"""Positional encodings: `functional` has the formulas, `base` the interface, the others one kind of encoding each."""
