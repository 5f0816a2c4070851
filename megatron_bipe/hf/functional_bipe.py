"""In an exported folder this file is a copy of `model/positions/functional.py`."""

from megatron_bipe.model.positions.functional import *  # noqa: F403
