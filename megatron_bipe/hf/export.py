"""Weights of the training model -> a Hugging Face folder, published only once it has proved to be the same model.

Everything is written beside the target, loaded back the way users will, compared with the training model
on sample windows, and renamed into place last: a folder under the final name is always a correct one.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.card import PLOT, PerplexityPlot, model_card
from megatron_bipe.hf.checksums import SUMS, write_checksums
from megatron_bipe.hf.hf_config import DataFields, generation_settings, hf_settings
from megatron_bipe.hf.load import CONFIG, INDEX, WEIGHTS
from megatron_bipe.hf.parity import SampleBatch, parity
from megatron_bipe.hf.tokenizer_files import TOKENIZER_FILES, TokenizerSource, write_tokenizer
from megatron_bipe.hf.weight_mapping import LlamaWeights
from megatron_bipe.io import sync
from megatron_bipe.model.positions import functional
from megatron_bipe.model.transformer import build_model
from megatron_bipe.tensor_file import write_tensors

# Largest difference of a logit over the largest logit, both in fp32. Measured: up to 3.5e-7; the smallest
# mistakes tried (a slope factor of 95 for 96, a separator counted to the next segment), at initial weights of std
# 0.02, give 1e-3 and more.
TOLERANCE = 2e-5
# Files of an exported folder, and what each is a copy of.
REMOTE_CODE = {
    f"{name}_bipe.py": Path(__file__).with_name(f"{name}_bipe.py")
    for name in ("configuration", "modeling", "positions", "encodings", "rotary", "bias")
} | {"functional_bipe.py": Path(functional.__file__)}
GENERATION, CARD = "generation_config.json", "README.md"
_WRITTEN = {CONFIG, GENERATION, CARD, PLOT, INDEX, SUMS, *TOKENIZER_FILES, *REMOTE_CODE}  # and weights
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


class ExportOptions(NamedTuple):
    """How to write it."""

    dtype: torch.dtype = torch.bfloat16
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    title: str = "BiPE language model"
    facts: Mapping[str, str] = {}
    """Rows for the model card: recipe, data fingerprint, step, ..."""
    perplexity: PerplexityPlot | None = None
    """What an evaluation found, for the model card."""


def export_model(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    folder: Path,
    data: DataFields,
    sequences: SampleBatch,
    tokenizer: TokenizerSource | None = None,
    options: ExportOptions | None = None,
) -> float:
    """Write an HF folder and return its parity figure.

    Memory: one weight at a time, then one layer at a time and the logits of the windows; what `weights` reads when it
    is asked is not held beyond that.

    Args:
        weights: plan names, whole tensors.
        config: the model they belong to.
        folder: target; its parent must be writable.
        data: goes into config.json and the generation settings.
        sequences: sample windows with the ids that training gave them; other ids of the exported model show
            as a difference.
        tokenizer: None only where none is known; the folder then has no tokenizer files.
        options: dtype, sharding, overwriting, model card.

    Returns:
        Largest difference of a logit over the largest logit, both models in fp32 from the exported weights.

    Raises:
        CheckpointError: the folder exists, the weights do not fit, or the exported model is not the same one.
    """
    options = options or ExportOptions()
    with _published(Path(folder), options.overwrite) as draft:
        shapes = _shapes(config, options.dtype)
        files = _write_weights(LlamaWeights(weights, config), shapes, draft, options.max_shard_bytes)
        write_checksums(draft, files)
        settings = hf_settings(config, data, options.dtype)
        _write_json(draft / CONFIG, settings)
        _write_json(draft / GENERATION, generation_settings(config, data))
        if settings["model_type"] == "bipe":
            _write_code(draft)
        if tokenizer is not None:
            write_tokenizer(tokenizer, draft, config.vocab_size)
        figure = parity(weights, config, options.dtype, draft, sequences)
        if not figure <= TOLERANCE:
            raise CheckpointError(
                f"the exported model is not the trained one: logits differ by {figure:.2e} of the largest, "
                f"allowed are {TOLERANCE:.0e}",
                remedy="Check that the segment rule is the training data's; else this is a defect, please report it",
                location=folder,
            )
        if options.perplexity is not None:
            (draft / PLOT).write_bytes(options.perplexity.png)
        more = (tokenizer is not None, options.facts, options.perplexity)
        card = model_card(options.title, config, data, figure, shapes.values(), *more)
        (draft / CARD).write_text(card, "utf-8")
    return figure


def _shapes(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of such a model as they will be stored, without content."""
    with torch.device("meta"):
        weights = dict(build_model(config).named_parameters())  # a tied output is not named again
    return {name: weight.to(dtype) for name, weight in LlamaWeights(weights, config).items()}


def _write_code(folder: Path) -> None:
    """The remote code, its first file marked with the version of all.

    transformers goes by the configuration's class: within one process, another version of the model under an
    unchanged configuration file would be taken for the version it has seen first.
    """
    texts = {name: source.read_text("utf-8") for name, source in REMOTE_CODE.items()}
    version = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:16]
    texts["configuration_bipe.py"] += f"\n# Version of this remote code: {version}\n"
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")


def _write_weights(
    weights: Mapping[str, Tensor], shapes: Mapping[str, Tensor], folder: Path, max_shard_bytes: int
) -> dict[str, str]:
    """safetensors, in one file or in shards with an index; one weight is in memory at a time. Checksums by file."""
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(dict(shapes), filename_pattern=pattern, max_shard_size=max_shard_bytes)
    sums, read = {}, partial(_as_stored, weights, shapes)
    for file, names in split.filename_to_tensors.items():
        held = {name: shapes[name] for name in names}
        sums[file] = write_tensors(folder / file, held, {"format": "pt"}, read).sha256
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return sums


def _as_stored(weights: Mapping[str, Tensor], shapes: Mapping[str, Tensor], name: str) -> Tensor:
    """A weight as it goes into the files, cut and rounded when it is asked for."""
    like = shapes[name]
    try:
        weight, problem = weights[name], ""
    except RuntimeError as error:  # torch, where rows cannot be cut as the configuration says
        weight, problem = like, str(error)
    if problem or weight.shape != like.shape:
        raise CheckpointError(
            "the weights do not fit the configuration: "
            + (problem or f"{name} is {list(weight.shape)} and would be {list(like.shape)}"),
            remedy="Check that the weights and the configuration belong to the same model",
        )
    return weight.to(like.dtype).contiguous()


@contextmanager
def _published(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A draft folder that takes `folder`'s place when the block succeeds, and vanishes when it fails.

    The draft has the final name inside a temporary parent: transformers names the module of remote code after it.
    """
    folder = folder.resolve()
    if folder.exists() and not overwrite:
        raise CheckpointError("the output exists already", remedy="Choose another, or add --overwrite", location=folder)
    if folder.exists():
        _check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.export-", dir=folder.parent))
    except OSError as error:
        what = f"no folder can be made there: {error.strerror}"
        raise CheckpointError(what, remedy="Choose another", location=folder) from error
    try:
        draft = scratch / folder.name
        draft.mkdir()
        yield draft
        for file in draft.iterdir():
            sync(file)
        _put_in_place(draft, folder, scratch / "replaced")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace what is no model folder, or has more in it than an export writes."""
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise CheckpointError("the output exists and is no model folder", remedy="Choose another", location=folder)
    names = (path.name for path in folder.iterdir() if path.is_file())
    ours = {name for name in names if name in _WRITTEN or _WEIGHTS.fullmatch(name)}
    foreign = sorted({path.name for path in folder.iterdir()} - ours)
    if foreign:
        what = f"the output holds what no export writes: {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}"
        raise CheckpointError(what, remedy="Move that away, or choose another output", location=folder)


def _put_in_place(draft: Path, folder: Path, replaced: Path) -> None:
    """The draft takes the folder's name; whatever happens, one of both has it."""
    try:
        if folder.exists():
            folder.rename(replaced)
        draft.rename(folder)
        sync(folder.parent)
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
