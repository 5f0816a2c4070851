"""Look at a dataset folder: `verify` checks all of it, `stats` counts, `show` draws a document's segments."""

import argparse
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from _cli import run_tool
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspect import find_problems, open_tokenizer, stats_table
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.show import show_document
from megatron_bipe.errors import DataError


def main() -> None:
    """Parse the command line and call the library."""
    arguments = _parser().parse_args()
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    helps = {
        "verify": "read every byte: checksums, structure, ids, and bits against a new segmentation",
        "stats": "documents, tokens, segments, text bytes, segment length",
        "show": "draw a document with its segments and both ids of each token",
    }
    runs = {"verify": verify, "stats": stats, "show": show}
    for name, run in runs.items():
        command = commands.add_parser(name, help=helps[name], description=helps[name])
        command.add_argument("folder", type=Path, metavar="DIR", help="dataset folder: the one with manifest.json")
        command.set_defaults(run=run)
        if name == "show":
            command.add_argument("--document", type=int, default=0, metavar="N", help="number from 0 (default: 0)")
            command.add_argument("--tokens", type=int, default=256, metavar="M", help="at most M (default: 256)")
            command.add_argument(
                "--color",
                action=argparse.BooleanOptionalAction,
                default=sys.stdout.isatty(),
                help="mark segments by background colour (default: on a terminal)",
            )
    return parser


def verify(arguments: argparse.Namespace) -> None:
    """Print every problem as it is found; end with an error if there was one."""
    dataset = TokenDataset(arguments.folder)
    total = sum(file.bytes for shard in dataset.manifest.shards for file in shard.files.values())
    count = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        for problem in find_problems(dataset, bar.update):
            bar.write(f"{problem}", file=sys.stderr)
            count += 1
    if count:
        raise DataError(f"{count} problem(s), listed above", remedy="See each of them", place=arguments.folder)
    print(f"{arguments.folder}: whole. {len(dataset.shards)} shards, {dataset.num_tokens:,} tokens, {total:,} bytes.")


def stats(arguments: argparse.Namespace) -> None:
    """Print the counts; only the manifest is read."""
    print(stats_table(Manifest.load(arguments.folder)))


def show(arguments: argparse.Namespace) -> None:
    """Print one document."""
    if arguments.tokens < 1:
        raise DataError(f"--tokens {arguments.tokens} shows nothing", remedy="Give 1 or more", place="--tokens")
    dataset = TokenDataset(arguments.folder)
    width = shutil.get_terminal_size((120, 24)).columns
    tokenizer = open_tokenizer(dataset)
    print(show_document(dataset, tokenizer, arguments.document, arguments.tokens, color=arguments.color, width=width))


if __name__ == "__main__":
    run_tool(main)
