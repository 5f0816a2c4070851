"""Whether the quickstart's models show the effect of the paper, seed by seed.

The three models of examples/quickstart.yaml are trained for each seed with the project's own commands, two at a time
with one thread each, and evaluated on the same held-out text; `megatron_bipe/eval/quickstart_results.py` says what
counts as the effect. What is finished is not done again, so an interrupted run goes on where it stopped, and seeds can
be added.

Example: python tools/bench/quickstart.py --output quickstart-seeds --seeds 0..9
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command, parse_range
from _steps import FROM_TEXT_TO_DATA, Pattern, Stage, fill, run_steps, run_values
from bench._machine import describe_machine
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.eval.quickstart_results import (
    JUDGED_STRETCHES,
    ExtrapolationEffect,
    extrapolation_effect,
    read_column,
)
from quickstart import CONFIG, CORPUS

ENCODINGS = ("bipe_rope", "rope", "bipe_alibi")
SIDE_BY_SIDE = 2
TRAIN = Pattern(
    "Train {each}",
    "OMP_NUM_THREADS=1 python pretrain.py --ds_config ds_configs/zero1.json --config {config} "
    "--set run_dir={out}/runs/{each} --set model.encoding={encoding} --set train.seed={seed} "
    "--set train.micro_batch={batch} "
    "--set data.path={out}/data/train --set data.valid_path={out}/data/valid {settings}",
    "runs/{each}/checkpoints/step-{steps:08d}",
)
EVALUATE = Pattern(
    "Evaluate seed {each}",
    "python tools/evaluate.py perplexity --model {runs} --data {out}/data/valid --lengths {lengths} "
    "--max-tokens 100000 --output {out}/evaluation/{each}",
    "evaluation/{each}/perplexity.csv",
)


@command
def main(argv: Sequence[str] | None) -> None:
    """Train and evaluate what is not there yet, print the table."""
    arguments = _parser().parse_args(argv)
    folder, seeds = arguments.output, list(arguments.seeds)
    run = load_run_config(CONFIG, arguments.set)
    run_steps(plan(folder, seeds, arguments.set), folder)
    nats = {seed: read_column(folder / f"evaluation/{seed}/perplexity.csv", "nats_per_token") for seed in seeds}
    precision = load_run_config(folder / "runs" / run_name("rope", seeds[0]) / "config.yaml").train.precision
    print(f"\n{describe_machine('torch', 'deepspeed')}, {precision}\n\n{table(nats, run)}")


def plan(folder: Path, seeds: list[int], settings: list[str]) -> list[Stage]:
    """All stages in order: the data, the models two at a time, an evaluation for each seed."""
    values, train = run_values(CONFIG, settings, CORPUS), load_run_config(CONFIG, settings).train
    values["lengths"] = ",".join(str(stretch * train.seq_len_tokens) for stretch in (1, *JUDGED_STRETCHES))
    trainings, evaluations = [], []
    for seed, encoding in product(seeds, ENCODINGS):
        more = {"encoding": encoding, "seed": seed}
        trainings += fill([TRAIN], folder, values | more, [run_name(encoding, seed)])
    for seed in seeds:
        runs = " ".join(f"{{out}}/runs/{run_name(encoding, seed)}" for encoding in ENCODINGS)
        evaluate = EVALUATE._replace(command=EVALUATE.command.replace("{runs}", runs))
        evaluations += fill([evaluate], folder, values, [str(seed)])
    steps = [step for stage in trainings for step in stage]
    pairs = [steps[first : first + SIDE_BY_SIDE] for first in range(0, len(steps), SIDE_BY_SIDE)]
    return [*fill(FROM_TEXT_TO_DATA, folder, values, ()), *pairs, *evaluations]


def run_name(encoding: str, seed: int) -> str:
    """Name of a model's run folder."""
    return f"{encoding}-{seed}"


def table(nats: dict[int, dict[str, dict[int, float]]], run: RunConfig) -> str:
    """Losses at the training length, rises beyond it, their ratios and the verdict, a row for each seed."""
    trained = run.train.seq_len_tokens
    twice, four_times = (f"{stretch * trained}" for stretch in JUDGED_STRETCHES)
    heads = ["seed", *(f"{encoding} at {trained}, {twice}, {four_times}" for encoding in ENCODINGS)]
    heads += [f"RoPE's rise over BiPE-RoPE's at {twice}", f"at {four_times}", "the effect shows"]
    rows = [heads, ["---"] * len(heads)]
    effects = {seed: extrapolation_effect(losses, trained) for seed, losses in nats.items()}
    rows += [_row(seed, nats[seed], effect, trained) for seed, effect in effects.items()]
    shown = sum(effect.shows for effect in effects.values())
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{lines}\nNats a token, rises from {trained} tokens; the effect shows in {shown} of {len(nats)} seeds."


def _row(seed: int, nats: dict[str, dict[int, float]], effect: ExtrapolationEffect, trained: int) -> list[str]:
    losses = [
        f"{nats[encoding][trained]:.3f}, " + ", ".join(f"{rise:+.3f}" for rise in effect.rises_nats[encoding])
        for encoding in ENCODINGS
    ]
    ratios = [f"{ratio:.1f}" for ratio in effect.ratios]
    return [str(seed), *losses, *ratios, "yes" if effect.shows else "no"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("quickstart-seeds"), help="data, runs, results (default: %(default)s)")
    add("--seeds", type=parse_range, default=range(1), metavar="N|A..B", help="train.seed of the runs (default: 0)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to pretrain.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())
