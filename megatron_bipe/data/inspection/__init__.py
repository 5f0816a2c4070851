"""What people do with a dataset besides training: verify it, show it, count its segments, change its segment rule."""
