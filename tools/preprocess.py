"""Convert raw text to a dataset: tokens, segment ends and a manifest. After an interruption, the same command resumes.

Example: python tools/preprocess.py --input pile/train --tokenizer llama_tokenizer --output data/pile --workers 8
Several nodes that share a file system: mpiexec -n 64 python tools/preprocess.py --input ... (the same options).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _cli import add_line_limits, command
from preprocessing.build import CHECK_SHARE, SHARD_TOKENS, BuildOptions, build
from preprocessing.destinations import SPLIT_EXAMPLE
from preprocessing.readers.inputs import SUFFIXES
from preprocessing.readers.lines import LONGEST_LINE_BYTES
from preprocessing.workers import join_ranks


@command
def main(argv: Sequence[str] | None) -> None:
    options = BuildOptions(**vars(_parser().parse_args(argv)))
    with join_ranks() as ranks:
        for folder, made in build(options, ranks).items():
            print(
                f"{folder}: {made.num_documents} documents, {made.num_tokens} tokens, {made.num_segments} segments, "
                f"{(made.text_bytes or 0) / 1e6:.1f} MB of text, {len(made.shards)} shard(s)"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    inputs = f"files, folders or globs of {SUFFIXES}; folders saved by `datasets`; names on the Hub (org/name:split)"
    add("--input", dest="inputs", nargs="+", required=True, metavar="FILE", help=inputs)
    add("--tokenizer", required=True, metavar="DIR_OR_NAME", help="tokenizer folder or file, or a name on the Hub")
    add("--output", required=True, type=Path, metavar="DIR", help="dataset folder to make")
    add(
        "--segments",
        default="reference",
        metavar="RULE",
        help="reference, sentence, newline, fixed:N, or a JSON list of token ids or of strings (default: %(default)s)",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes, or processes per rank (default: %(default)s)")
    add("--partition-by", metavar="KEY", help="one dataset per value of this key, e.g. meta.pile_set_name")
    add("--split", metavar="NAME=SHARE,...", help=f"one dataset per split, by a hash of the text, e.g. {SPLIT_EXAMPLE}")
    add("--deduplicate", action="store_true", help="skip texts that equal an earlier one; reads everything twice")
    add("--append-eos", action="store_true", help="end every document with the tokenizer's EOS token")
    add("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="maximum tokens in a shard (default: 2^30)")
    add("--text-key", default="text", metavar="KEY", help="key of the text in a record (default: %(default)s)")
    empty = "keep texts without characters as documents of special tokens alone, as the authors' evaluation does"
    add("--empty-texts", choices=("keep", "drop"), default="drop", help=f"{empty} (default: %(default)s)")
    add("--special-in-text", action="store_true", help='"<s>" in the text is a special token; exports do the same')
    add(
        "--backend",
        choices=("auto", "gigatoken", "stock"),
        default="auto",
        help="gigatoken is fast; stock is the tokenizer's own library; auto: gigatoken if both agree "
        "(default: %(default)s)",
    )
    add(
        "--check-share",
        type=float,
        default=CHECK_SHARE,
        metavar="X",
        help="fraction of the text that is also tokenized by the stock library and compared; of texts above 200,000 "
        "characters, pieces are (default: %(default)s)",
    )
    add(
        "--on-difference",
        choices=("stop", "fall-back"),
        default="stop",
        help="if a comparison fails: stop and name the document, or start again with stock (default: %(default)s)",
    )
    add_line_limits(parser, LONGEST_LINE_BYTES)
    add("--overwrite", action="store_true", help="replace an existing dataset, once the new one is finished")
    return parser


if __name__ == "__main__":
    sys.exit(main())
