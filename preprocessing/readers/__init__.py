"""Input files of all formats: their division into ranges, and their documents."""
