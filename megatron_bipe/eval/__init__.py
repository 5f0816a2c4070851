"""Evaluation of models: losses by sequence length, reports, generation, other harnesses; and their conversion."""
