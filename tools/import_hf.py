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
from typing import TYPE_CHECKING

from _cli import check_model_folder, command
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.data.segments import SegmentRule, Vocabulary, resolve_rule
from megatron_bipe.data.tokenizer import DEFINITIONS, Tokenizer, load_tokenizer
from megatron_bipe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_bipe.hf.authors_checkpoint import AuthorsModel


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    check_model_folder(arguments.input, remedy="Name the folder of a model, one with config.json")
    if arguments.output and arguments.output.resolve() == arguments.input.resolve():
        raise ConfigError("the output is the input", remedy="Name another --output", location=arguments.output)
    if arguments.output:
        _refuse({"--config": arguments.config, "--set": arguments.set}, "--output")
        to_model(arguments)
    else:
        to_run(arguments, load_run_config(arguments.config, [*arguments.set, f"run_dir={arguments.checkpoint}"]))


def _refuse(unused: Mapping[str, object], target: str) -> None:
    """Refuse options, given by name, that have no effect with the chosen target."""
    if given := [name for name, value in unused.items() if value]:
        raise ConfigError(f"{', '.join(given)} have no effect with {target}", remedy="Remove them", location=given[0])


def to_model(arguments: argparse.Namespace) -> None:
    """Convert to the Hugging Face layout, and print how much the logits differ."""
    from transformers.utils.logging import disable_progress_bar

    from _samples import random_sequences
    from megatron_bipe.hf.export import ExportOptions, export_model
    from megatron_bipe.hf.hf_config import DataFields
    from megatron_bipe.hf.load import read_settings
    from megatron_bipe.hf.tokenizer_files import TokenizerSource

    disable_progress_bar()
    model, tokenizer, rule = _published(arguments)
    settings = read_settings(arguments.input)
    named = {role: settings.get(f"{role}_token_id") for role in ("bos", "eos")}
    special_ids = tokenizer.special_ids if tokenizer else {role: i for role, i in named.items() if isinstance(i, int)}
    source = (
        TokenizerSource(tokenizer.definition, tokenizer.to_json(), special_ids, tokenizer.encode_batch)
        if tokenizer
        else None
    )
    figure = export_model(
        model.weights,
        model.config,
        arguments.output,
        DataFields(rule.spec, rule.token_ids, tokenizer.fingerprint if tokenizer else None, special_ids),
        random_sequences(model.config, rule, model.config.train_len_tokens),
        source,
        ExportOptions(
            dtype=model.dtype,
            overwrite=arguments.overwrite,
            title=arguments.output.name,
            facts={"Converted from": f"the BiPE authors' layout, folder `{arguments.input.resolve().name}`"},
        ),
    )
    print(f"{arguments.output}: logits differ from the training model's by at most {figure:.1e} of the largest")


def to_run(arguments: argparse.Namespace, run: RunConfig) -> None:
    """Convert to checkpoint 0 of a run."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_bipe.eval.eval_model import EvalModel, load_exported_model
    from megatron_bipe.eval.eval_model import named_weights
    from megatron_bipe.hf.load import build_from_llama, read_settings
    from megatron_bipe.hf.weight_mapping import to_llama
    from megatron_bipe.train.warm_start import start_run

    disable_progress_bar()
    if "rpe_type" in read_settings(arguments.input):
        model, tokenizer, rule = _published(arguments)
        full_model = build_from_llama(to_llama(model.weights, model.config), model.config, arguments.input)
        fingerprint = tokenizer.fingerprint if tokenizer else None
        eval_model = EvalModel(arguments.input.name, str(arguments.input), full_model, model.config, fingerprint, rule)
    else:
        own = {"--tokenizer": arguments.tokenizer, "--segments": arguments.segments}
        _refuse(own, "--checkpoint of a model that records its tokenizer and rule")
        eval_model = load_exported_model(arguments.input)
    folder = start_run(run, eval_model, named_weights(eval_model))
    print(f"{folder}: pretrain.py continues from here with the same --config and --set, and run_dir={run.run_dir}")


def _published(arguments: argparse.Namespace) -> "tuple[AuthorsModel, Tokenizer | None, SegmentRule]":
    from megatron_bipe.hf.authors_checkpoint import read_authors_checkpoint

    model = read_authors_checkpoint(arguments.input)
    tokenizer = _tokenizer(arguments.tokenizer or arguments.input, required=arguments.tokenizer is not None)
    return model, tokenizer, _rule(arguments.segments or "reference", tokenizer, model.config.vocab_size)


def _tokenizer(folder: Path, required: bool) -> Tokenizer | None:
    """Return the requested tokenizer, or the one next to the weights if there is one."""
    if required or any((folder / name).is_file() for name in DEFINITIONS):
        return load_tokenizer(folder)
    return None


class _IdsOnly:
    """Vocabulary of known size without the tokens' texts."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def text_of(self, _token_id: int) -> None:
        """Return None: no token's text is known."""


def _rule(spec: str, tokenizer: Vocabulary | None, vocab_size: int) -> SegmentRule:
    """Return the segment rule; without a tokenizer, the reference rule is the authors' ids."""
    if tokenizer is not None:
        return resolve_rule(spec, tokenizer)
    if spec == "reference":
        from megatron_bipe.hf.authors_checkpoint import PUBLISHED_SEPARATORS

        return SegmentRule(spec=spec, token_ids=PUBLISHED_SEPARATORS)
    try:
        return resolve_rule(spec, _IdsOnly(vocab_size))
    except DataError as error:
        raise DataError(
            f"{error.message}; there is no tokenizer to resolve it with",
            remedy="Give --tokenizer, or use reference, fixed:N or a list of ids",
            location="--segments",
        ) from error


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
