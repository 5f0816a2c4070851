"""The training state on disk: find, verify, write and load checkpoints, which do not depend on the layout of ranks."""
