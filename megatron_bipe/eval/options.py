"""Default options of the evaluation commands; torch-free, so that `--help` is fast."""

from megatron_bipe.eval.sequences import Protocol

DEFAULT_PROTOCOL: Protocol = "full"
EVAL_BATCH_TOKENS = 16_384  # per forward pass
PROMPT_BATCH_TOKENS = 65_536  # per generation batch, prompts and continuations
