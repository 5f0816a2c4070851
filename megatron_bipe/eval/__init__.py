"""Evaluation of checkpoints and exported models: losses by sequence length, reports, generation, other harnesses."""
