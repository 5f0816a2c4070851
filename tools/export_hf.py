"""Export a training checkpoint to a Hugging Face folder, verified against the training model before it appears.

Example: python tools/export_hf.py --checkpoint runs/bipe_rope_151m@500000 --output exported/bipe_rope_151m
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from _cli import command
from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.config import StoredPrecision
from megatron_bipe.errors import ConfigError


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parser().parse_args(argv)
    if given.max_shard_gb <= 0:
        raise ConfigError(
            f"--max-shard-gb {given.max_shard_gb:g}", remedy="Give more than 0", location="--max-shard-gb"
        )
    checkpoint = find_checkpoint(given.checkpoint)

    from transformers.utils.logging import disable_progress_bar

    from megatron_bipe.eval.convert import export_checkpoint
    from megatron_bipe.hf.card import CardFacts

    disable_progress_bar()
    card = CardFacts(languages=given.language, datasets=given.datasets)
    options = {"max_shard_bytes": int(given.max_shard_gb * 1e9), "overwrite": given.overwrite}
    error = export_checkpoint(checkpoint, given.output, given.dtype, given.evaluation, card, **options)
    print(f"{given.output}: logits differ from the training model's by at most {error:.1e} of the largest")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN_DIR[@STEP]", help="run folder; without STEP, its newest checkpoint")
    add("--output", required=True, type=Path, metavar="DIR", help="model folder to make")
    add(
        "--dtype",
        choices=get_args(StoredPrecision),
        help="precision of the stored weights (default: that of training)",
    )
    add("--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest weight file (default: %(default)s)")
    add("--evaluation", type=Path, metavar="DIR", help="results of evaluate.py perplexity, for the model card")
    add("--language", nargs="+", default=(), metavar="CODE", help="languages for the model card, such as en")
    add("--datasets", nargs="+", default=(), metavar="NAME", help="training data on the Hub, for the model card")
    add("--overwrite", action="store_true", help="replace an existing model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
