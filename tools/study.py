"""Train positional encodings on the same text for the same steps, and evaluate at up to 8 times the training length.

Every step is a command of this project. It is shown before it runs, and finished steps are skipped, so an interrupted
study resumes. Encodings with a maximum length are evaluated up to that.

Example: python tools/study.py --output study --encodings rope bipe_rope
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from _cli import command
from _steps import FROM_TEXT_TO_DATA, TRAIN_EACH, Pattern, Stage, fill, run_steps, run_values
from megatron_bipe.config import ENCODINGS, load_run_config
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.quickstart_results import read_column
from megatron_bipe.io import write_atomically
from quickstart import STRETCHES

CONFIG = Path("examples/extrapolation_cpu.yaml")
CORPUS = ""  # the defaults of tools/corpus.py
TITLE = "Perplexity on held-out text, encodings with equal training"
EVALUATE_EACH = Pattern(
    "Evaluate {each}",
    "python tools/evaluate.py perplexity --model {out}/runs/{each} --data {out}/data/valid --lengths {lengths} "
    "--max-tokens 100000 --output {out}/evaluation/{each}",
    "evaluation/{each}/perplexity.png",
)


@command
def main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("study"), help="default: %(default)s")
    parser.add_argument("--encodings", nargs="+", default=list(ENCODINGS), metavar="NAME", help="default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to pretrain.py")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.output
    reach = supported_lengths(arguments.encodings, arguments.set)
    run_steps(plan(folder, reach, arguments.set), folder)

    from megatron_bipe.eval.chart import Line, draw_png, perplexity_chart

    found = perplexities(folder, reach)
    text, train_len_tokens = table(found), min(next(iter(reach.values())))
    lines = [
        Line(encoding, sorted(by_length.items()), style, train_len_tokens)
        for style, (encoding, by_length) in enumerate(found.items())
    ]
    write_atomically(folder / "table.md", text.encode())
    write_atomically(folder / "perplexity.png", draw_png(perplexity_chart(lines, TITLE)))
    print(f"\nPerplexity on held-out text, by sequence length in tokens\n\n{text}")
    print(f"Written: {folder / 'table.md'} {folder / 'perplexity.png'}")


def supported_lengths(encodings: list[str], settings: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the lengths at which each encoding can be evaluated.

    Raises:
        ConfigError: an encoding is unknown, named twice, or supports none of the lengths.
    """
    if len(set(encodings)) < len(encodings):
        raise ConfigError("an encoding is named twice", remedy="Name each once", location="--encodings")
    result = {}
    for encoding in encodings:
        run = load_run_config(CONFIG, [*settings, f"model.encoding={encoding}"])
        lengths = (stretch * run.train.seq_len_tokens for stretch in STRETCHES)
        longest = run.model.max_seq_len_tokens
        result[encoding] = tuple(length for length in lengths if longest is None or length <= longest)
        if not result[encoding]:
            raise ConfigError(
                f"{encoding} supports {longest} tokens, but training sequences have {run.train.seq_len_tokens}",
                remedy="Remove it, or raise its maximum length",
                location="--set",
            )
    return result


def plan(folder: Path, reach: dict[str, tuple[int, ...]], settings: list[str]) -> list[Stage]:
    stages = fill((*FROM_TEXT_TO_DATA, TRAIN_EACH), folder, run_values(CONFIG, settings, CORPUS), reach)
    for encoding, lengths in reach.items():
        stages += fill([EVALUATE_EACH], folder, {"lengths": ",".join(map(str, lengths))}, [encoding])
    return stages


def perplexities(folder: Path, reach: Iterable[str]) -> dict[str, dict[int, float]]:
    """Return the perplexities by encoding, in the given order, and sequence length."""
    return {
        encoding: read_column(folder / "evaluation" / encoding / "perplexity.csv", "perplexity")[encoding]
        for encoding in reach
    }


def table(found: dict[str, dict[int, float]]) -> str:
    """Format perplexities as a Markdown table with a row for each encoding."""
    columns = sorted({length for by_length in found.values() for length in by_length})
    lines = [["encoding", *map(str, columns)], ["---"] * (len(columns) + 1)]
    for encoding, by_length in found.items():
        values = (by_length.get(length) for length in columns)
        lines.append([f"`{encoding}`", *("" if value is None else f"{value:.1f}" for value in values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
