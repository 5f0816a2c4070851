"""Tasks of lm-evaluation-harness on an exported model; its package, `lm_eval`, is an extra.

Source: Gao et al., "A framework for few-shot language model evaluation" (EleutherAI/lm-evaluation-harness).
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.hf.checksums import check_folder
from megatron_bipe.hf.load import read_settings


class HarnessSettings(NamedTuple):
    """How tasks are run."""

    include_path: Path | None = None
    """Folder of task files of one's own."""
    num_fewshot: int | None = None
    """Examples before each question; None: what the task says."""
    limit: int | None = None
    """Only the first so many samples of each task."""
    batch_size: int = 8
    """Requests a forward pass."""
    max_length_tokens: int | None = None
    """Longest input, beyond which contexts are cut on the left and texts into windows; None: the training length."""
    device: str = "cpu"
    """Where the model runs."""
    dtype: str = "float32"
    """Precision it runs in, in torch's name."""


class OpeningOnce(HFLM):
    """transformers' model, as the harness has it, but for one thing.

    The harness lets a text whose likelihood is asked for open with BOS, and has the tokenizer put another before it.
    In training there was one.
    """

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the longest input, each token predicted once."""
        before = vars(self)["add_bos_token"]
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = before


def run_tasks(folder: Path, tasks: Sequence[str], settings: HarnessSettings) -> dict[str, Any]:
    """Evaluate the model of a folder; returns what `lm_eval.simple_evaluate` does, samples included.

    Raises:
        CheckpointError: there is no exported model, or it cannot be loaded.
        ConfigError: there is no such task.
    """
    read_settings(folder)
    check_folder(folder)
    manager = TaskManager(include_path=settings.include_path)
    _check_known(tasks, manager)
    try:
        model = OpeningOnce(
            pretrained=str(folder),
            trust_remote_code=True,
            device=settings.device,
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            max_length=settings.max_length_tokens,
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the harness cannot load it: {' '.join(str(error).split())[:300]}",
            remedy="Name a folder with weights and tokenizer, made by tools/export_hf.py or tools/import_hf.py",
            location=folder,
        ) from error
    results: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=manager,
        bootstrap_iters=1000,
    )
    return results


def _check_known(tasks: Sequence[str], manager: TaskManager) -> None:
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            raise ConfigError(
                f"there is no task {task!r}" + (f"; near it are {', '.join(near)}" if near else ""),
                remedy="Name a task of lm-evaluation-harness, or the folder of your own with --include",
                location="--tasks",
            )
