"""Export of training weights to a Hugging Face folder, which is published only after a parity check.

All files are written to a temporary folder next to the target, loaded back the way users load them, compared with the
training model on sample sequences, and renamed last: a folder under the final name is always a correct one. The
comparison holds one layer in memory at a time.

B batch · T positions · V vocabulary
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from megatron_bipe.config import ModelConfig
from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.card import PLOT, CardFacts, model_card
from megatron_bipe.hf.checksums import SUMS, write_checksums
from megatron_bipe.hf.hf_config import DataFields, generation_settings, hf_settings
from megatron_bipe.hf.load import CONFIG, INDEX, WEIGHTS, load_layer
from megatron_bipe.hf.tokenizer_files import TOKENIZER_FILES, TokenizerSource, write_tokenizer
from megatron_bipe.hf.transformers_models import load_own_export
from megatron_bipe.hf.weight_mapping import LlamaWeights
from megatron_bipe.io import atomic_directory
from megatron_bipe.model import build_model, make_plan
from megatron_bipe.model.positions import functional
from megatron_bipe.tensor_file import write_tensors

# Largest difference of a logit over the largest logit, both in fp32. Measured: up to 3.5e-7; the smallest mistakes
# tried (slope factor 95 instead of 96, separator in the next segment) give at least 1e-3 at initial weights (std 0.02).
TOLERANCE = 2e-5
# The same if the exported model computes in fp16, and the training model in fp32 from weights that are not rounded.
# Measured: 1e-3 at initial weights (std 0.02), up to 1.1e-2 at std 0.2; activations that overflow give NaN.
TOLERANCE_FP16 = 0.05
_TOKENS_IN_FP16 = 128  # enough to show an overflow; processors without fp16 arithmetic are slow
# Files of an exported folder, and the source file of each.
REMOTE_CODE = {
    f"{name}_bipe.py": Path(__file__).with_name(f"{name}_bipe.py")
    for name in ("configuration", "modeling", "positions", "encodings")
} | {"functional_bipe.py": Path(functional.__file__)}
GENERATION, CARD = "generation_config.json", "README.md"
_WRITTEN = {CONFIG, GENERATION, CARD, PLOT, INDEX, SUMS, *TOKENIZER_FILES}
_CODE = re.compile(r"\w+_bipe\.py")  # of all versions


SampleBatch = tuple[Tensor, Tensor, Tensor]  # tokens, intra ids, inter ids: int64 [B, T] each


class ExportOptions(NamedTuple):
    """Options of an export."""

    dtype: torch.dtype = torch.bfloat16
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    card: CardFacts = CardFacts()
    """Facts for the model card: name, data, step, recipe, evaluation results, ..."""


def export_model(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    folder: Path,
    data: DataFields,
    sequences: SampleBatch,
    tokenizer: TokenizerSource | None = None,
    options: ExportOptions | None = None,
) -> float:
    """Write a Hugging Face folder and return the parity error.

    One weight is in memory at a time, then one layer and the logits of the sequences; `weights` may load lazily.

    Args:
        weights: unsharded tensors by the training model's names.
        config: configuration of the model.
        folder: target; its parent must be writable.
        data: facts about the training data, for config.json and the generation settings.
        sequences: sample sequences with the position ids of training; the parity check detects other ids.
        tokenizer: None only if none is known; the folder then has no tokenizer files.
        options: dtype, sharding, overwriting, model card.

    Returns:
        Largest difference of a logit over the largest logit, both models in fp32 from the exported weights.

    Raises:
        CheckpointError: the folder exists, the weights do not fit the configuration or the dtype, or the exported model
            differs from the trained one.
    """
    options = options or ExportOptions()
    with _draft(Path(folder), options.overwrite) as draft:
        shapes = _stored_weights(config, options.dtype)
        files = _write_weights(LlamaWeights(weights, config), shapes, draft, options.max_shard_bytes)
        settings = hf_settings(config, data, options.dtype)
        _write_json(draft / CONFIG, settings)
        _write_json(draft / GENERATION, generation_settings(config, data))
        if settings["model_type"] == "bipe":
            _write_code(draft)
        if tokenizer is not None:
            write_tokenizer(tokenizer, draft, config.vocab_size)
        write_checksums(draft, files)
        figure = parity(weights, config, options.dtype, draft, sequences)
        if not figure <= TOLERANCE:
            raise CheckpointError(
                f"the exported model differs from the trained one: logits differ by {figure:.2e} of the largest, "
                f"the limit is {TOLERANCE:.0e}",
                remedy="Use the segment rule of the training data; if it is the same, report this as a bug",
                location=folder,
            )
        facts = options.card
        if options.dtype == torch.float16:
            half = _check_fp16(weights, config, draft, sequences, folder)
            row = f"logits differ from the training model's by at most {half:.1e} of the largest"
            facts = facts._replace(rows={**facts.rows, "Computed in fp16": row})
        if facts.perplexity is not None:
            (draft / PLOT).write_bytes(facts.perplexity.png)
        card = model_card(facts, config, data, figure, shapes.values())
        (draft / CARD).write_text(card, "utf-8")
    return figure


def _stored_weights(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the model's weights as they will be stored, on the meta device."""
    with torch.device("meta"):
        weights = dict(build_model(config).named_parameters())  # a tied output is named once
    return {name: weight.to(dtype) for name, weight in LlamaWeights(weights, config).items()}


def _write_code(folder: Path) -> None:
    """Write the remote code and append the version of all files to the first.

    transformers caches code by the configuration's class: within one process, another version of the model with an
    unchanged configuration file would be taken for the version loaded first.
    """
    texts = {name: source.read_text("utf-8") for name, source in REMOTE_CODE.items()}
    version = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:16]
    texts["configuration_bipe.py"] += f"\n# Version of this remote code: {version}\n"
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")


def _write_weights(
    weights: Mapping[str, Tensor], shapes: Mapping[str, Tensor], folder: Path, max_shard_bytes: int
) -> dict[str, str]:
    """Write safetensors, sharded with an index if large, one weight at a time; return checksums by file."""
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(dict(shapes), filename_pattern=pattern, max_shard_size=max_shard_bytes)
    sums, read = {}, partial(_read_for_storage, weights, shapes)
    for file, names in split.filename_to_tensors.items():
        meta = {name: shapes[name] for name in names}
        sums[file] = write_tensors(folder / file, meta, {"format": "pt"}, read).sha256
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return sums


def _read_for_storage(weights: Mapping[str, Tensor], shapes: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a weight as it is stored: split and cast on access."""
    like = shapes[name]
    try:
        weight, problem = weights[name], ""
    except RuntimeError as error:  # torch: rows cannot be split as the configuration requires
        weight, problem = like, str(error)
    if problem or weight.shape != like.shape:
        raise CheckpointError(
            "the weights do not fit the configuration: "
            + (problem or f"{name} is {list(weight.shape)}, expected {list(like.shape)}"),
            remedy="Check that the weights and the configuration belong to the same model",
        )
    stored = weight.to(like.dtype).contiguous()
    if stored.isinf().any() and weight.isfinite().all():
        raise CheckpointError(
            f"{name} has a weight of magnitude {float(weight.abs().max()):g}, the largest number of fp16 is "
            f"{torch.finfo(like.dtype).max:g}",
            remedy="Store the weights with --dtype bf16 or fp32",
            location=name,
        )
    return stored


@contextmanager
def _draft(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a draft of an exported folder; it has the final name, after which transformers names the remote code."""
    folder = folder.resolve()
    if folder.exists() and not overwrite:
        raise CheckpointError("the output folder exists", remedy="Choose another, or add --overwrite", location=folder)
    if folder.exists():
        _check_replaceable(folder)  # before anything is written
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = stack.enter_context(atomic_directory(folder, overwrite=overwrite, check=_check_replaceable))
        except OSError as error:
            what = f"the folder cannot be created: {error.strerror}"
            raise CheckpointError(what, remedy="Choose another", location=folder) from error
        yield draft


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but an exported model without foreign files: its checksums list its weights."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    missing = next((name for name in (CONFIG, SUMS) if not (folder / name).is_file()), "")
    if missing and not is_empty:
        what = f"the output exists and is not an exported model: it has no {missing}"
        raise CheckpointError(what, remedy="Choose another output", location=folder)
    sums = "" if is_empty else (folder / SUMS).read_text("utf-8", "replace")
    ours = _WRITTEN | {line.partition("  ")[2] for line in sums.splitlines()}
    foreign = sorted(
        path.name
        for path in folder.iterdir()
        if not path.is_file() or path.is_symlink() or not (path.name in ours or _CODE.fullmatch(path.name))
    )
    if foreign:
        what = f"the output has foreign files: {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}"
        raise CheckpointError(what, remedy="Move them, or choose another output", location=folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def parity(
    weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, folder: Path, sequences: SampleBatch
) -> float:
    """Return the largest difference of a logit over the largest logit, both models in fp32.

    Args:
        weights: weights of the training model by its names.
        config: configuration of the model.
        dtype: dtype to which the weights are rounded first, as in the folder.
        folder: the exported model.
        sequences: sequences to compare on.

    Raises:
        CheckpointError: transformers cannot load or run the folder.
    """
    with torch.inference_mode():
        expected_BTV = trained_logits(weights, config, dtype, sequences)
        return _relative_difference(exported_logits(folder, sequences[0]), expected_BTV)


def _relative_difference(found_BTV: Tensor, expected_BTV: Tensor) -> float:
    """Return the largest difference over the largest expected value; overwrites `found_BTV`."""
    scale = float(expected_BTV.abs().max())
    return float(found_BTV.sub_(expected_BTV).abs_().max()) / max(scale, torch.finfo(torch.float32).tiny)


def _check_fp16(
    weights: Mapping[str, Tensor], config: ModelConfig, draft: Path, sequences: SampleBatch, location: Path
) -> float:
    """Return the largest relative difference of the logits computed in fp16, on the start of the first sequence.

    Raises:
        CheckpointError: it exceeds `TOLERANCE_FP16`.
    """
    tokens_BT, intra_BT, inter_BT = (ids_BT[:1, :_TOKENS_IN_FP16] for ids_BT in sequences)
    with torch.inference_mode():
        expected_BTV = trained_logits(weights, config, torch.float32, (tokens_BT, intra_BT, inter_BT))
        half = _relative_difference(exported_logits(draft, tokens_BT, torch.float16), expected_BTV)
    if not half <= TOLERANCE_FP16:
        raise CheckpointError(
            f"computed in fp16, the logits differ from the training model's by {half:.2e} of the largest, the limit is "
            f"{TOLERANCE_FP16:g}: the range or the precision of fp16 does not suffice for this model",
            remedy="Store the weights with --dtype bf16 or fp32",
            location=location,
        )
    return half


def trained_logits(
    weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, sequences: SampleBatch
) -> Tensor:
    """Return the training model's logits, fp32 [B, T, V]."""
    payload: Any = sequences
    for planned in make_plan(config, seed=0):
        with torch.device("meta"):
            layer = planned.build()
        payload = load_layer(layer, planned.index, weights, config, dtype)(payload)
    logits_BTV: Tensor = payload
    return logits_BTV


def exported_logits(folder: Path, tokens_BT: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the logits, fp32 [B, T, V], of a folder with its own code, weights read layer by layer.

    Args:
        folder: the model folder.
        tokens_BT: token ids.
        dtype: precision of the computation.
    """
    try:
        logits_BTV: Tensor = load_own_export(folder, dtype)(tokens_BT, use_cache=False).logits
        return logits_BTV.float()
    except (CheckpointError, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"the exported model cannot be loaded and run: {error}",
            remedy="Report this as a bug",
            location=folder,
        ) from error
