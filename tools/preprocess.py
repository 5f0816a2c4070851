"""Raw text to a dataset: tokens, segment ends and a manifest.

Example: python tools/preprocess.py --input pile/train --tokenizer llama_tokenizer --output data/pile --workers 8
"""

import argparse
from pathlib import Path

from _cli import add_max_malformed, run_tool
from preprocessing.build import SHARD_TOKENS, BuildOptions, build
from preprocessing.readers import SUFFIXES


def main() -> None:
    """Parse the command line, build, and say what was made."""
    options = BuildOptions(**vars(_parser().parse_args()))
    for folder, made in build(options).items():
        print(
            f"{folder}: {made.num_documents} documents, {made.num_tokens} tokens, {made.num_segments} segments, "
            f"{made.text_bytes / 1e6:.1f} MB of text, {len(made.shards)} shard(s)"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    kinds = ", ".join(SUFFIXES)
    add("--input", dest="inputs", nargs="+", required=True, metavar="FILE", help=f"files, folders or globs of {kinds}")
    add("--tokenizer", required=True, metavar="DIR_OR_NAME", help="tokenizer folder or file, or a name on the Hub")
    add("--output", required=True, type=Path, metavar="DIR", help="dataset folder to make")
    add(
        "--segments",
        default="reference",
        metavar="RULE",
        help="reference, sentence, newline, fixed:N, or a JSON list of token ids or of strings (default: %(default)s)",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: %(default)s)")
    add("--partition-by", metavar="KEY", help="one dataset per value of this key, e.g. meta.pile_set_name")
    add("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="most tokens in a shard (default: 2^30)")
    add("--text-key", default="text", metavar="KEY", help="key of the text in a JSON line (default: %(default)s)")
    add("--special-in-text", action="store_true", help='make a literal "<s>" in the text a special token')
    add_max_malformed(parser)
    add("--overwrite", action="store_true", help="replace a dataset that is there")
    return parser


if __name__ == "__main__":
    run_tool(main)
