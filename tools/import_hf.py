"""Convert a model in the authors' layout to this project's Hugging Face layout, or to a run that trains it further.

Examples: python tools/import_hf.py --input downloads/BiPE_RoPE-151M --output models/bipe_rope_151m
          python tools/import_hf.py --input models/bipe_rope_151m --checkpoint runs/further --config examples/NAME.yaml

With --checkpoint the input may also be a model of tools/export_hf.py; pretrain.py then continues with the same
--config, --set and run_dir.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from _cli import check_model_folder, command
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.errors import ConfigError


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parser().parse_args(argv)
    check_model_folder(given.input, remedy="Name the folder of a model, one with config.json")
    if given.output and given.output.resolve() == given.input.resolve():
        raise ConfigError("the output is the input", remedy="Name another --output", location=given.output)
    if given.output:
        _refuse({"--config": given.config, "--set": given.set}, "--output")
        to_model(given)
    else:
        to_run(given, load_run_config(given.config, [*given.set, f"run_dir={given.checkpoint}"]))


def _refuse(unused: Mapping[str, object], target: str) -> None:
    """Refuse options, given by name, that have no effect with the chosen target."""
    if given := [name for name, value in unused.items() if value]:
        raise ConfigError(f"{', '.join(given)} have no effect with {target}", remedy="Remove them", location=given[0])


def to_model(given: argparse.Namespace) -> None:
    """Convert to the Hugging Face layout, and print how much the logits differ."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_bipe.eval.convert import export_published, read_published

    disable_progress_bar()
    published = read_published(given.input, given.tokenizer, given.segments)
    error = export_published(published, given.output, given.overwrite)
    print(f"{given.output}: logits differ from the training model's by at most {error:.1e} of the largest")


def to_run(given: argparse.Namespace, run: RunConfig) -> None:
    """Convert to checkpoint 0 of a run."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_bipe.eval.convert import read_published
    from megatron_bipe.eval.eval_model import load_exported_model, named_weights
    from megatron_bipe.hf.load import read_settings
    from megatron_bipe.train.warm_start import start_run

    disable_progress_bar()
    if "rpe_type" in read_settings(given.input):
        eval_model = read_published(given.input, given.tokenizer, given.segments).eval_model()
    else:
        own = {"--tokenizer": given.tokenizer, "--segments": given.segments}
        _refuse(own, "--checkpoint of a model that records its tokenizer and rule")
        eval_model = load_exported_model(given.input)
    folder = start_run(run, eval_model, named_weights(eval_model))
    print(f"{folder}: pretrain.py continues from here with the same --config and --set, and run_dir={run.run_dir}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, type=Path, metavar="DIR", help="folder in the authors' layout")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, metavar="DIR", help="model folder to make")
    target.add_argument(
        "--checkpoint", type=Path, metavar="RUN_DIR", help="run folder to make, to train the model further"
    )
    add("--config", type=Path, help="with --checkpoint: configuration of the run (default: as pretrain.py)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="with --checkpoint: override one of its fields")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder (default: the input folder, if it has one)")
    add("--segments", metavar="RULE", help="segment rule of the model (default: reference)")
    add("--overwrite", action="store_true", help="replace an existing model; never a run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
