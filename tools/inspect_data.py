"""Inspect dataset folders: `verify` checks all files, `stats` counts, `show` draws a document's segments.

`resegment` writes a dataset again under another segment rule, without tokenizing again, and makes datasets of pairs of
.bin and .idx that Megatron-LM or GPT-NeoX wrote.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from _cli import add_picture_options, check_output_file, command, picture_settings
from megatron_bipe.data.dataset import TokenDataset, dataset_files, find_datasets, open_tokenizer
from megatron_bipe.data.inspection.convert_pairs import convert_pairs, describe_documents
from megatron_bipe.data.inspection.megatron_pairs import MegatronPair, find_pairs
from megatron_bipe.data.inspection.resegment import resegment
from megatron_bipe.data.inspection.show import show_document
from megatron_bipe.data.inspection.stats import SAMPLE_TOKENS, Statistics, count_dataset
from megatron_bipe.data.inspection.stats_text import (
    as_json,
    datasets_table,
    distribution_tables,
    draw_stats,
    stats_table,
)
from megatron_bipe.data.inspection.verify import find_problems
from megatron_bipe.data.manifest import MANIFEST_NAME, Manifest
from megatron_bipe.data.segments import RULE_FORMS
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.io import write_atomically
from megatron_bipe.picture import Format, picture_format, save_figure

_UNVERIFIED = "Checksums are not verified here; `inspect_data.py verify` does that."
_log = logging.getLogger(__name__)


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)


def verify(arguments: argparse.Namespace) -> None:
    """Print every problem as it is found; raise `DataError` at the end if there was one."""
    _require_workers(arguments)
    if not 0 <= arguments.sample <= 1:
        raise DataError(f"--sample is {arguments.sample}", remedy="Give a share, 0 to 1", location="--sample")
    datasets = [TokenDataset(folder) for folder in find_datasets(arguments.folder)]
    shards = [shard for dataset in datasets for shard in dataset.manifest.shards]
    total = sum(file.bytes for shard in shards for file in shard.files.values())
    count = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        for problem in find_problems(datasets, workers=arguments.workers, sample=arguments.sample, advance=bar.update):
            bar.write(f"{problem}", file=sys.stderr)
            count += 1
    if count:
        raise DataError(f"{count} problem(s), listed above", remedy="Fix each of them", location=arguments.folder)
    among = f"{len(datasets)} datasets, " if len(datasets) > 1 else ""
    part = "" if arguments.sample == 1 else f" Ids and bits were checked for a fraction of {arguments.sample:g}."
    tokens = sum(dataset.num_tokens for dataset in datasets)
    print(f"{arguments.folder}: complete. {among}{len(shards)} shards, {tokens:,} tokens, {total:,} bytes.{part}")


def stats(arguments: argparse.Namespace) -> None:
    """Print the counts of the manifests, then distributions of lengths; write the plot and JSON if requested."""
    _require_workers(arguments)
    _log.info(_UNVERIFIED)
    if arguments.sample_tokens < 1:
        raise DataError(
            f"--sample-tokens is {arguments.sample_tokens}", remedy="Give 1 or more", location="--sample-tokens"
        )
    picture = picture_settings(arguments)
    pictures = _beside(arguments.png, picture.formats)
    outputs = [*pictures.values(), *([arguments.json] if arguments.json else [])]
    for file in outputs:
        check_output_file(file, arguments.overwrite)
    folders = find_datasets(arguments.folder)
    datasets = {_name(folder, arguments.folder): TokenDataset(folder) for folder in folders}
    manifests = {name: dataset.manifest for name, dataset in datasets.items()}
    _refuse_data_files(outputs, datasets.values())
    print(datasets_table(manifests) if len(manifests) > 1 else stats_table(*manifests.values()), end="\n\n")
    found = _count(datasets, arguments)
    print(distribution_tables(found))
    if arguments.json:
        content = {name: as_json(*counted) for name, counted in found.items()}
        write_atomically(arguments.json, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
    if arguments.png:
        figure = draw_stats({name: counted for name, (_, counted) in found.items()}, picture)
        for kind, file in pictures.items():
            write_atomically(file, save_figure(figure, kind))


def _beside(file: Path | None, formats: Sequence[Format]) -> dict[Format, Path]:
    """Return the pictures to write for `--png`, which names the PNG; none if it is not given."""
    if file is None:
        return {}
    if picture_format(file) != "png":
        raise DataError(
            f"{file.name} does not end with .png", remedy="Name a .png; --formats selects others", location="--png"
        )
    return {kind: file.with_suffix(f".{kind}") if kind != "png" else file for kind in formats}


def _refuse_data_files(outputs: Iterable[Path], datasets: Iterable[TokenDataset]) -> None:
    """Raise `DataError` if a file to be written is one of a dataset, even with --overwrite."""
    data_files = {
        file.resolve()
        for dataset in datasets
        for file in dataset_files(dataset.path, (shard.name for shard in dataset.manifest.shards))
    }
    for output in outputs:
        if output.resolve() in data_files:
            raise DataError("This file belongs to the dataset", remedy="Name another file", location=output)


def show(arguments: argparse.Namespace) -> None:
    if arguments.tokens < 1:
        raise DataError(f"--tokens {arguments.tokens} shows nothing", remedy="Give 1 or more", location="--tokens")
    _log.info(_UNVERIFIED)
    dataset = TokenDataset(arguments.folder)
    width = shutil.get_terminal_size((120, 24)).columns
    tokenizer = open_tokenizer(dataset)
    print(show_document(dataset, tokenizer, arguments.document, arguments.tokens, color=arguments.color, width=width))


def resegment_dataset(arguments: argparse.Namespace) -> None:
    """Write the dataset, or pairs of Megatron, under another segment rule."""
    _require_workers(arguments)
    make: Callable[..., Manifest]
    if arguments.tokenizer is None:
        total, make = Manifest.load(arguments.folder).num_tokens, partial(resegment, arguments.folder)
    else:
        pairs = _pairs(arguments.folder)
        total = sum(pair.num_tokens for pair in pairs)
        make = partial(convert_pairs, pairs, load_tokenizer(arguments.tokenizer))
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="resegment", disable=None) as bar:
        made = make(
            arguments.segments,
            arguments.output,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            advance=bar.update,
        )
    print(f"{arguments.output}: {made.num_tokens} tokens, {made.num_segments} segments by rule {made.rule.spec}")
    if arguments.tokenizer is not None:
        print(describe_documents(made))


def _pairs(folder: Path) -> list[MegatronPair]:
    """Return the pairs to convert; raise `DataError` if the folder is a dataset, which has its own tokenizer."""
    if (folder / MANIFEST_NAME).exists():
        what = "--tokenizer is for pairs of Megatron; this folder is a dataset, which has its own tokenizer"
        raise DataError(what, remedy="Remove --tokenizer", location=folder)
    return find_pairs(folder)


def _count(
    datasets: Mapping[str, TokenDataset], arguments: argparse.Namespace
) -> dict[str, tuple[Manifest, Statistics]]:
    limit = None if arguments.all else arguments.sample_tokens
    total = sum(min(dataset.num_tokens, limit or dataset.num_tokens) for dataset in datasets.values())
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="stats", disable=None, leave=False) as bar:
        return {
            name: (dataset.manifest, count_dataset(dataset, limit, workers=arguments.workers, advance=bar.update))
            for name, dataset in datasets.items()
        }


def _name(folder: Path, within: Path) -> str:
    return str(folder) if folder == within else str(folder.relative_to(within))


def _require_workers(arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        raise DataError(f"--workers is {arguments.workers}", remedy="Give 1 or more", location="--workers")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_verify(commands.add_parser("verify", help="check checksums, structure, ids and bits of all files"))
    _add_stats(commands.add_parser("stats", help="show counts, and lengths of segments and documents"))
    _add_show(commands.add_parser("show", help="draw a document with its segments and both ids of each token"))
    _add_resegment(
        commands.add_parser(
            "resegment", help="write tokens under another segment rule; convert Megatron's .bin and .idx"
        )
    )
    return parser


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.description = "Check all files: checksums, structure, ids, and bits against a new segmentation."
    _add_folder(command, "dataset folder, or one with several: the output of --partition-by or --split")
    _add_workers(command)
    share = "fraction of the tokens whose ids and bits are checked; checksums cover all (default: %(default)g)"
    command.add_argument("--sample", type=float, default=1.0, metavar="FRACTION", help=share)
    command.set_defaults(run=verify)


def _add_stats(command: argparse.ArgumentParser) -> None:
    command.description = "Count documents, tokens and segments; show their lengths, and segments in 1024 tokens."
    _add_folder(command, "dataset folder, or one with several: the output of --partition-by or --split")
    _add_workers(command)
    add = command.add_argument
    add("--all", action="store_true", help="count all of each dataset, not a sample")
    sample = "tokens to count per dataset, in evenly spread blocks (default: %(default)s)"
    add("--sample-tokens", type=int, default=SAMPLE_TOKENS, metavar="N", help=sample)
    add("--png", type=Path, metavar="FILE", help="plot the distributions; PDF and SVG are written, too")
    add_picture_options(command)
    add("--json", type=Path, metavar="FILE", help="write the figures for scripts")
    add("--overwrite", action="store_true", help="replace these files")
    command.set_defaults(run=stats)


def _add_show(command: argparse.ArgumentParser) -> None:
    command.description = "Draw a document with its segments and both ids of each token."
    _add_folder(command, "dataset folder: the one with manifest.json")
    add = command.add_argument
    add("--document", type=int, default=0, metavar="N", help="its number, from 0 (default: 0)")
    add("--tokens", type=int, default=256, metavar="M", help="show at most M (default: 256)")
    color = "mark segments by background colour (default: on a terminal)"
    add("--color", action=argparse.BooleanOptionalAction, default=sys.stdout.isatty(), help=color)
    command.set_defaults(run=show)


def _add_resegment(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Make the dataset that tools/preprocess.py would make with another rule. With --tokenizer, make a dataset of "
        "Megatron's pairs of .bin and .idx. Tokens are not copied where the file system has hard links."
    )
    _add_folder(command, "dataset folder, the one with manifest.json; or pairs: their folder, or one without suffix")
    add = command.add_argument
    tokenizer = "for pairs: folder, file or Hub name of the tokenizer that made them"
    add("--tokenizer", metavar="DIR_OR_NAME", help=tokenizer)
    add("--segments", required=True, metavar="RULE", help=RULE_FORMS)
    add("--output", required=True, type=Path, metavar="DIR", help="dataset folder to make")
    _add_workers(command)
    add("--overwrite", action="store_true", help="replace an existing dataset, once the new one is finished")
    command.set_defaults(run=resegment_dataset)


def _add_folder(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("folder", type=Path, metavar="DIR", help=what)


def _add_workers(command: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))  # available to this process; a scheduler may limit them
    command.add_argument("--workers", type=int, default=cores, metavar="N", help="shards read at once (default: cores)")


if __name__ == "__main__":
    sys.exit(main())
