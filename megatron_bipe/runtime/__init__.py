"""The process: what started it and what it starts, its environment variables, the device and its precision, its log."""
