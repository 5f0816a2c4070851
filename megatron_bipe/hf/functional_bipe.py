"""Formulas of the encodings; an exported folder holds a copy of `model/positions/functional.py` here."""

from megatron_bipe.model.positions.functional import *  # noqa: F403
