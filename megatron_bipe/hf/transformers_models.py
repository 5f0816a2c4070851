"""Models and tokenizers of a folder as transformers objects, without running any code that the folder brings or names.

`bipe` models get this package's classes, whatever their folder's `auto_map` says. Any other folder that names code is
refused before transformers reads it.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.checksums import check_folder
from megatron_bipe.hf.load import CONFIG, read_settings, shard_names
from megatron_bipe.hf.modeling_bipe import BipeForCausalLM

_AUTO = "AutoModelForCausalLM"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_REMEDY = "Give a folder with weights and tokenizer, made by tools/export_hf.py or tools/import_hf.py"


def load_causal_lm(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Verify a model folder and load its model.

    Args:
        folder: the model folder.
        dtype: dtype of the loaded weights.
        trust_remote_code: run the code that config.json names, also instead of this package's.
        options: further options of `from_pretrained`.

    Raises:
        CheckpointError: the folder is damaged or incomplete, or names code that is not trusted.
    """
    settings = _check(folder, trust_remote_code)
    return _load(folder, settings, trust_remote_code, {"dtype": dtype, **options})


def load_own_export(folder: Path, dtype: torch.dtype) -> Any:
    """Load a folder that this process has just written, with the code in it, and its weights from the disk."""
    with _silence_accelerate():
        return _load(folder, read_settings(folder), True, {"dtype": dtype, "device_map": {"": "disk"}})


def load_auto_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a folder's tokenizer as users do, with `AutoTokenizer`.

    Raises:
        CheckpointError: there is none, or the folder names code that is not trusted.
    """
    _refuse_code(folder, trust_remote_code)
    with _loading_errors(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _check(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    settings = read_settings(folder)
    _refuse_code(folder, trust_remote_code)
    for index in folder.glob("*.index.json"):
        shard_names(index, _REMEDY)
    check_folder(folder)
    return settings


def _load(folder: Path, settings: Mapping[str, Any], trust_remote_code: bool, options: Mapping[str, Any]) -> Any:
    with _loading_errors(folder):
        code = _named_code(settings).get(_AUTO) if trust_remote_code else None
        kind: Any = BipeForCausalLM if settings.get("model_type") == "bipe" else AutoModelForCausalLM
        if code is not None:  # the Auto class would prefer this package's code
            kind = get_class_from_dynamic_module(code, folder)
        model, report = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(  # transformers would draw them at random
            f"{len(missing)} weights of {type(model).__name__} are not in the folder: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else ""),
            remedy="Give the folder of a language model with all of its weights",
            location=folder,
        )
    return model.eval()


def _named_code(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    code = settings.get("auto_map")
    return code if isinstance(code, dict) else {}


def _refuse_code(folder: Path, trust_remote_code: bool) -> None:
    """Raise CheckpointError if transformers would run, or ask whether to run, code that is not part of a package."""
    if trust_remote_code:
        return
    for name, settings in ((name, _read(folder / name)) for name in (CONFIG, _TOKENIZER_CONFIG)):
        ours = name == CONFIG and settings.get("model_type") == "bipe"
        named = {} if ours else {"auto_map": settings.get("auto_map")}
        # A name with a slash is a repository of the Hub, from which transformers loads compiled code.
        named |= {key: settings.get(key) for key in _KERNELS if "/" in str(settings.get(key))}
        if found := {key: value for key, value in named.items() if value}:
            raise CheckpointError(
                f"{name} names code that is not part of this project or transformers: "
                + ", ".join(f"{key} {value!r}" for key, value in found.items()),
                remedy="Remove that entry if the model does not need it; or read the code, and add --trust-remote-code",
                location=folder / name,
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", remedy=_REMEDY, location=path) from error
    return settings if isinstance(settings, dict) else {}


@contextmanager
def _loading_errors(folder: Path) -> Iterator[None]:
    """Turn the exceptions with which transformers refuses a folder into a `CheckpointError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot load the folder: {' '.join(str(error).split())[:300]}",
            remedy=_REMEDY,
            location=folder,
        ) from error


@contextmanager
def _silence_accelerate() -> Iterator[None]:
    """Suppress accelerate's message that weights are on disk, which is intended here."""
    logger = logging.getLogger("accelerate.big_modeling")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
