"""Export a training checkpoint to a Hugging Face folder, verified against the training model before it appears.

Example: python tools/export_hf.py --checkpoint runs/bipe_rope_151m@500000 --output exported/bipe_rope_151m
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import yaml

from _cli import command
from megatron_bipe.checkpoint.find import Checkpoint, find_checkpoint
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.schema import ComputePrecision, RunConfig
from megatron_bipe.data.blend import open_blend
from megatron_bipe.data.manifest import TOKENIZER_FOLDER, DataRecord
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from megatron_bipe.hf.card import PerplexityPlot
    from megatron_bipe.hf.export import SampleBatch

log = logging.getLogger(__name__)


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.max_shard_gb <= 0:
        raise ConfigError(
            f"--max-shard-gb {arguments.max_shard_gb:g}", remedy="Give more than 0", location="--max-shard-gb"
        )
    checkpoint = find_checkpoint(arguments.checkpoint)
    export(checkpoint, arguments)


def export(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """Write the model folder, and print how much its logits differ from the training model's."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_bipe.checkpoint.find import read_data_record
    from megatron_bipe.eval.model_loading import LazyCheckpointWeights
    from megatron_bipe.hf.export import ExportOptions, export_model
    from megatron_bipe.hf.hf_config import DataFields
    from megatron_bipe.hf.tokenizer_files import TokenizerSource
    from megatron_bipe.model.precision import DTYPES

    disable_progress_bar()
    run = load_run_config(checkpoint.run_dir / "config.yaml")
    record = read_data_record(checkpoint.run_dir)
    tokenizer = load_tokenizer(checkpoint.run_dir / TOKENIZER_FOLDER)
    recipe_fields = run.model_dump(mode="json", exclude={"run_dir", "data"})
    recipe = yaml.safe_dump(recipe_fields, default_flow_style=True, width=1 << 20)
    facts = {
        "Step": f"{checkpoint.step:,}",
        "Training data fingerprint": f"`{record.fingerprint}`",
        "Recipe": f"`{recipe.strip()}`",
    }
    perplexity = _perplexity(arguments.evaluation, checkpoint) if arguments.evaluation else None
    figure = export_model(
        LazyCheckpointWeights(checkpoint),
        run.model,
        arguments.output,
        DataFields(record.rule.spec, record.rule.token_ids, record.tokenizer.fingerprint, tokenizer.special_ids),
        _sequences(run, record),
        TokenizerSource(tokenizer.definition, tokenizer.to_json(), tokenizer.special_ids, tokenizer.encode_batch),
        ExportOptions(
            DTYPES[arguments.dtype or run.train.precision],
            int(arguments.max_shard_gb * 1e9),
            arguments.overwrite,
            arguments.output.name,
            facts,
            perplexity,
        ),
    )
    print(f"{arguments.output}: logits differ from the training model's by at most {figure:.1e} of the largest")


def _perplexity(folder: Path, checkpoint: Checkpoint) -> "PerplexityPlot":
    """Return the results of `evaluate.py perplexity` for this checkpoint, for the model card.

    Raises:
        CheckpointError: the folder holds no such results, or only those of other models.
    """
    from megatron_bipe.eval.report import JSON_NAME, PNG_NAME
    from megatron_bipe.hf.card import PerplexityPlot

    source = f"{checkpoint.run_dir}@{checkpoint.step}"
    try:
        report = json.loads((folder / JSON_NAME).read_text("utf-8"))
        png = (folder / PNG_NAME).read_bytes()
        found = {_resolved(model["source"]): model["results"] for model in report["models"]}
        data = f"`{report['data']['name']}` (fingerprint `{report['data']['fingerprint']}`)"
        about = f"Perplexity on {data}, {report['protocol']} protocol, in {report['dtype']}."
        results = found.get(_resolved(source))
        rows = [(f"{r['length_tokens']:,}", f"{r['perplexity'] or math.inf:,.2f}") for r in results or []]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the results of the evaluation cannot be read: {error}",
            remedy="Name the --output of tools/evaluate.py perplexity",
            location=folder,
        ) from error
    if results is None:
        raise CheckpointError(
            f"the evaluation is of {', '.join(found)}, not of {source}",
            remedy=f"Make one with tools/evaluate.py perplexity --model {source}",
            location=folder,
        )
    lines = [("sequence length", *(length for length, _ in rows)), ("---",) * (len(rows) + 1)]
    table = "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (*lines, ("perplexity", *(value for _, value in rows)))
    )
    return PerplexityPlot(png, f"{about}\n\n{table}")


def _resolved(source: str) -> str:
    run_dir, _, step = source.rpartition("@")
    return f"{Path(run_dir).resolve()}@{step}"


def _sequences(run: RunConfig, record: DataRecord) -> "SampleBatch":
    """Return two sequences of the training data with their position ids; random ones if the data is gone."""
    from _samples import random_sequences
    from megatron_bipe.data.collate import make_batch

    try:
        blend = open_blend(run.data, run.train.seq_len_tokens, run.train.seed)
        if blend.record.fingerprint == record.fingerprint:
            sequences = np.arange(min(2, blend.num_sequences))
            batch = make_batch(blend, sequences, run.train.seq_len_tokens, run.model.intra_clip)
            return batch.tokens_BT, batch.intra_BT, batch.inter_BT
        folders = ", ".join(map(str, run.data.folders))
        log.info("%s: no longer the data of this run; comparing on random tokens", folders)
    except (ConfigError, DataError) as error:
        log.info("Comparing on random tokens, since the training data cannot be read: %s", error)
    return random_sequences(run.model, record.rule, run.train.seq_len_tokens)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN_DIR[@STEP]", help="run folder; without STEP, its newest checkpoint")
    add("--output", required=True, type=Path, metavar="DIR", help="model folder to make")
    add(
        "--dtype",
        choices=get_args(ComputePrecision),
        help="precision of the stored weights (default: that of training)",
    )
    add("--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest weight file (default: %(default)s)")
    add("--evaluation", type=Path, metavar="DIR", help="results of evaluate.py perplexity, for the model card")
    add("--overwrite", action="store_true", help="replace an existing model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
