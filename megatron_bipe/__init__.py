"""Pretraining of language models with bilevel positional encoding; docs/architecture.md describes the packages."""
