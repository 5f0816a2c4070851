"""What commands of tools/evaluate.py share: settings of an evaluation, its options, and checks of its data."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import pick_device, pick_dtype
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.sequences import DEFAULT_EMPTY_TEXTS, DEFAULT_PROTOCOL, EVAL_BATCH_TOKENS, PROTOCOLS

if TYPE_CHECKING:
    import torch

    from megatron_bipe.data.dataset import TokenDataset
    from megatron_bipe.eval.harness import HarnessSettings
    from megatron_bipe.eval.perplexity import EvalSettings

DEFAULT = "(default: %(default)s)"
_log = logging.getLogger(__name__)


def add_text_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `eval_settings`, but for those of the device, and of `verify_data`."""
    add = command.add_argument
    add("--protocol", choices=list(PROTOCOLS), default=DEFAULT_PROTOCOL, help=f"how the corpus is cut {DEFAULT}")
    add(
        "--max-tokens", type=int, metavar="N", help="evaluate on complete documents, spread evenly, of at most N tokens"
    )
    empty = "documents of empty texts, which are special tokens alone; the authors keep them"
    add("--empty-texts", choices=("keep", "drop"), default=DEFAULT_EMPTY_TEXTS, help=f"{empty} {DEFAULT}")
    add("--no-verify", dest="verify", action="store_false", help="do not read all of the data to verify its checksums")
    add("--batch-tokens", type=int, metavar="N", default=EVAL_BATCH_TOKENS, help=f"tokens per forward pass {DEFAULT}")


def add_harness_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `harness_settings`, but for those of the device and of trust."""
    add = command.add_argument
    add(
        "--include",
        type=Path,
        metavar="DIR",
        help="folder of your own task files",
    )
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    add("--limit", type=int, metavar="N", help="only the first N samples of each task")
    add("--batch-size", type=int, default=8, metavar="N", help=f"requests per forward pass {DEFAULT}")
    add("--max-length", type=int, metavar="N", help="longest input in tokens (default: the training length)")


def verify_data(given: argparse.Namespace, datasets: Sequence["TokenDataset"]) -> None:
    """Compare the files of datasets with their manifests, or say that this is not done."""
    from megatron_bipe.data.inspection.verify import check_checksums

    if not given.verify:
        _log.warning("The checksums of %s are not verified (--no-verify)", ", ".join(str(d.path) for d in datasets))
    for dataset in datasets if given.verify else ():
        check_checksums(dataset)


def eval_settings(given: argparse.Namespace) -> "EvalSettings":
    import torch

    from megatron_bipe.eval.perplexity import EvalSettings
    from megatron_bipe.runtime.hardware import keep_freed_memory

    device = pick_device(given.device)
    keep_freed_memory(torch.device(device))
    dtype = pick_dtype(given.dtype, device)
    return EvalSettings(given.protocol, given.max_tokens, given.empty_texts, given.batch_tokens, device, dtype)


def harness_settings(given: argparse.Namespace, device: str, dtype: "torch.dtype") -> "HarnessSettings":
    from megatron_bipe.eval.harness import HarnessSettings

    return HarnessSettings(
        include_path=given.include,
        num_fewshot=given.num_fewshot,
        limit=given.limit,
        batch_size=given.batch_size,
        max_length_tokens=given.max_length,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        trust_remote_code=given.trust_remote_code,
    )


def missing_extra(package: str, extra: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{package} cannot be imported: {error}",
        remedy=f"Install it: pip install -e '.[{extra}]'",
        location=f"evaluate.py {extra}",
    )
