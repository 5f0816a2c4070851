"""Defaults of the evaluations that their commands show; free of torch, so that `--help` answers at once."""

from megatron_bipe.eval.sequences import Protocol

DEFAULT_PROTOCOL: Protocol = "full"
EVAL_BATCH_TOKENS = 16_384  # of one forward pass over windows
PROMPT_BATCH_TOKENS = 65_536  # of prompts and their continuations that are generated together
