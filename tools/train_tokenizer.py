"""Train a tokenizer in LLaMA's layout (SentencePiece BPE with byte fallback) on raw text.

Example: python tools/train_tokenizer.py --input pile/train --vocab-size 32000 --output tokenizers/pile-32k
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _cli import add_line_limits, command
from preprocessing.readers.inputs import SUFFIXES
from preprocessing.readers.lines import LONGEST_LINE_BYTES
from preprocessing.train_tokenizer import SAMPLE_BYTES, TrainOptions, train_tokenizer


@command
def main(argv: Sequence[str] | None) -> None:
    options = TrainOptions(**vars(_parser().parse_args(argv)))
    print(f"{train_tokenizer(options)}: {options.vocab_size} tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    inputs = f"files, folders or globs of {SUFFIXES}; folders saved by `datasets`; names on the Hub (org/name:split)"
    add("--input", dest="inputs", nargs="+", required=True, metavar="FILE", help=inputs)
    add("--vocab-size", type=int, required=True, metavar="N", help="tokens, special and byte tokens included")
    add("--output", required=True, type=Path, metavar="DIR", help="tokenizer folder to make")
    add(
        "--sample-bytes",
        type=int,
        default=SAMPLE_BYTES,
        metavar="N",
        help="train on this many bytes of the text, from every file in proportion to its size (default: %(default)s); "
        "needs about 14 times that in memory",
    )
    add("--text-key", default="text", metavar="KEY", help="key of the text in a JSON line (default: %(default)s)")
    add_line_limits(parser, LONGEST_LINE_BYTES)
    add("--overwrite", action="store_true", help="replace an existing tokenizer")
    return parser


if __name__ == "__main__":
    sys.exit(main())
