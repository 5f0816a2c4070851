"""Convert the data of a fine-tuning task to a dataset of examples, on which `pretrain.py` trains as on any other.

Example: python tools/prepare_task.py scrolls --task qasper --data scrolls --split train --tokenizer llama_tokenizer \
--output data/qasper
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _cli import command, parse_range
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.tasks.scrolls.tasks import SEQ_LEN_TOKENS, TASKS
from preprocessing.task_examples import (
    ARITHMETIC_SEGMENTS,
    ArithmeticOptions,
    ScrollsOptions,
    prepare_arithmetic,
    prepare_scrolls,
)


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = vars(_parser().parse_args(argv))
    make, options = arguments.pop("make"), arguments.pop("options")
    _report(arguments["output"], make(options(**arguments)))


def _report(folder: Path, made: Manifest) -> None:
    assert made.examples is not None
    print(
        f"{folder}: {made.num_documents // 2} examples of {made.examples.task}, {made.num_tokens} tokens, "
        f"{made.num_segments} segments, for sequences of {made.examples.seq_len_tokens} tokens"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_scrolls(commands.add_parser("scrolls", help="a split of a SCROLLS task"))
    _add_arithmetic(commands.add_parser("arithmetic", help="expressions modulo 11, solved step by step"))
    return parser


def _add_arithmetic(command: argparse.ArgumentParser) -> None:
    command.description = "Generate expressions modulo 11 and their solutions; equal options give equal data."
    add, shown = command.add_argument, "(default: %(default)s)"
    add("--output", required=True, type=Path, metavar="DIR", help="dataset folder to make, with its tokenizer")
    add("--operators", required=True, type=parse_range, metavar="N..M", help="operators per problem")
    add("--problems", required=True, type=int, metavar="N", help="number of problems")
    add("--length", required=True, type=int, metavar="N", help="maximum tokens of a problem with its solution")
    add("--seed", type=int, default=0, help=f"seed of the choice of problems {shown}")
    add("--held-out", action="store_true", help="use problems that training sets never contain")
    add("--segments", default=ARITHMETIC_SEGMENTS, metavar="RULE", help=f"where segments end {shown}")
    add("--overwrite", action="store_true", help="replace an existing dataset, once the new one is finished")
    command.set_defaults(make=prepare_arithmetic, options=ArithmeticOptions)


def _add_scrolls(command: argparse.ArgumentParser) -> None:
    command.description = "Convert a split of a SCROLLS task, with one example for each output of each input."
    add, shown = command.add_argument, "(default: %(default)s)"
    add("--task", required=True, metavar="NAME", help=", ".join(TASKS))
    add("--data", required=True, type=Path, metavar="DIR", help="holds NAME/SPLIT.jsonl, or NAME.zip as on the Hub")
    add("--split", default="train", help=f"train or validation {shown}")
    add("--tokenizer", required=True, metavar="DIR_OR_NAME", help="tokenizer of the model to be fine-tuned")
    add("--output", required=True, type=Path, metavar="DIR", help="dataset folder to make")
    add(
        "--length",
        type=int,
        default=SEQ_LEN_TOKENS,
        metavar="N",
        help=f"maximum tokens of prompt, answer and EOS {shown}",
    )
    add("--segments", default="reference", metavar="RULE", help=f"segment rule of the model {shown}")
    add("--overwrite", action="store_true", help="replace an existing dataset, once the new one is finished")
    command.set_defaults(make=prepare_scrolls, options=ScrollsOptions)


if __name__ == "__main__":
    sys.exit(main())
