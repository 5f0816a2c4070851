"""Train, evaluate and export three models from raw text on one machine in minutes, and write a report page.

Every step is a command of this project that you can run yourself. It is shown before it runs, its full output is kept,
and a step whose result exists is skipped, so an interrupted quickstart resumes. The last printed line is the path of
the page.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from _cli import command
from _steps import FROM_TEXT_TO_DATA, TRAIN_EACH, TRAIN_EACH_ALONE, Pattern, Stage, fill, run_steps, run_values
from megatron_bipe.config import load_run_config
from megatron_bipe.eval.quickstart_results import read_column, verdict
from megatron_bipe.io import write_atomically
from megatron_bipe.text_table import text_table

CONFIG = Path("examples/quickstart.yaml")
CORPUS = "--max-bytes 2000000 --valid-share 0.1"  # twice as much text as the training reads
ENCODINGS = ("bipe_rope", "bipe_alibi", "rope")
STRETCHES = (1, 2, 3, 4, 6, 8)  # evaluated lengths, as multiples of the training length
PROMPTS = ("The default value is", "def __init__(self, name):")
PAGE = "report.html"
MADE = {
    "results": "evaluation/perplexity.json, .csv, .png",
    "models": "exported/*  (AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True))",
    "runs": "runs/*  (metrics.jsonl, tensorboard/, checkpoints/)",
    "data": "data/train, data/valid  (python tools/inspect_data.py show DIR)",
    "logs": "logs/*",
}

EVALUATE = Pattern(
    "Evaluate at 1 to 8 times the training length",
    "python tools/evaluate.py perplexity --model {runs} --data {out}/data/valid --lengths {lengths} "
    "--max-tokens 60000 --output {out}/evaluation",
    "evaluation/perplexity.csv",
)
EXPORT = Pattern(
    "Export {each}",
    "python tools/export_hf.py --checkpoint {out}/runs/{each} --output {out}/exported/{each}",
    "exported/{each}/config.json",
    together=True,
)
GENERATE = Pattern(
    "Generate a few lines with bipe_rope",
    "python tools/generate.py --model {out}/exported/bipe_rope --max-new-tokens 60 --output {out}/generated.txt "
    "--prompt {prompts}",
    "generated.txt",
)


@command
def main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to pretrain.py")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.output
    run_steps(plan(folder, arguments.set), folder)
    summarise(folder, load_run_config(CONFIG, arguments.set).train.seq_len_tokens)


def plan(folder: Path, settings: list[str]) -> list[Stage]:
    """Return all stages in order; all models are trained at once, one on two ranks under ZeRO-2.

    Ranks wait for each other, and a starting process waits for the disk, so three trainings at once take less time
    than one after the other.
    """
    run = load_run_config(CONFIG, settings)
    values = run_values(CONFIG, settings, CORPUS) | {
        "lengths": ",".join(str(stretch * run.train.seq_len_tokens) for stretch in STRETCHES),
        "runs": " ".join(shlex.quote(f"{folder}/runs/{encoding}") for encoding in ENCODINGS),
        "prompts": shlex.join(PROMPTS),
    }
    first, *others = ENCODINGS
    on_two_ranks, alone = fill([TRAIN_EACH], folder, values, [first]), fill([TRAIN_EACH_ALONE], folder, values, others)
    return [
        *fill(FROM_TEXT_TO_DATA, folder, values, ()),
        [step for stage in (*on_two_ranks, *alone) for step in stage],
        *fill([EVALUATE], folder, values, ()),
        *fill([EXPORT], folder, values, ENCODINGS),
        *fill([GENERATE], folder, values, ()),
    ]


def summarise(folder: Path, train_len_tokens: int) -> None:
    """Write the report page; print the results and their paths."""
    from megatron_bipe.eval.quickstart_page import quickstart_page

    table = folder / "evaluation" / "perplexity.csv"
    text = verdict(read_column(table, "nats_per_token"), train_len_tokens)
    write_atomically(folder / PAGE, quickstart_page(folder, text, PROMPTS).encode())
    perplexities = read_column(table, "perplexity")
    lengths = sorted(next(iter(perplexities.values())))
    rows = [[encoding, *(f"{values[length]:.2f}" for length in lengths)] for encoding, values in perplexities.items()]
    print("\nPerplexity on held-out text\n")
    print(text_table([["tokens", *map(str, lengths)], *rows]))
    print(f"\n{text}\n\n{text_table([(what, f'{folder}/{where}') for what, where in MADE.items()], left=[1])}")
    print(f"\nAll results on one page, for a browser:\n{folder / PAGE}")


if __name__ == "__main__":
    sys.exit(main())
