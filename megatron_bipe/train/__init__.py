"""The training loop: `trainer` has the order of a step, the other modules what it calls."""
