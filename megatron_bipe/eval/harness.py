"""Evaluation of an exported model on tasks of lm-evaluation-harness; its package, `lm_eval`, is an extra.

Source: Gao et al., "A framework for few-shot language model evaluation" (EleutherAI/lm-evaluation-harness).
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.task_files import refuse_code, templates_without_code
from megatron_bipe.hf.load import read_settings
from megatron_bipe.hf.transformers_models import load_auto_tokenizer, load_causal_lm
from megatron_bipe.io import write_atomically


class HarnessSettings(NamedTuple):
    """Settings for running tasks."""

    include_path: Path | None = None
    """Folder with additional task files."""
    num_fewshot: int | None = None
    """Few-shot examples per question; None: the task's default."""
    limit: int | None = None
    """Evaluate only the first `limit` samples of each task."""
    batch_size: int = 8
    """Requests per forward pass."""
    max_length_tokens: int | None = None
    """Longest input; longer contexts are truncated on the left, texts are split. None: the training length."""
    device: str = "cpu"
    dtype: str = "float32"
    """Name of the torch dtype."""
    trust_remote_code: bool = False
    """Run the code that the model folder or the task files name."""


class SingleBosHFLM(HFLM):  # type: ignore[misc]
    """The harness's transformers model with a single BOS in front of rolling texts.

    For rolling log-likelihoods the harness prepends BOS and lets the tokenizer prepend another; training had one.
    """

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of full texts, split at the longest input, each token predicted once."""
        before = vars(self)["add_bos_token"]
        self.add_bos_token = False
        try:
            log_likelihoods: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
            return log_likelihoods
        finally:
            self.add_bos_token = before


def find_tasks(tasks: Sequence[str], settings: HarnessSettings) -> TaskManager:
    """Read all task files, which takes seconds, and check that they have these tasks.

    Raises:
        ConfigError: there is no such task, or a task file names code that is not trusted.
    """
    if settings.include_path is not None and not settings.trust_remote_code:
        refuse_code(settings.include_path)
    manager = TaskManager(include_path=settings.include_path)
    _check_known(tasks, manager)
    return manager


def run_tasks(
    folder: Path, tasks: Sequence[str], settings: HarnessSettings, manager: TaskManager | None = None
) -> dict[str, Any]:
    """Evaluate an exported model on tasks; return the result of `lm_eval.simple_evaluate`, including samples.

    Args:
        folder: the exported model.
        tasks: names of tasks, groups or patterns.
        settings: how tasks are run.
        manager: result of `find_tasks`; None: call it.

    Raises:
        CheckpointError: the folder is not an exported model, or cannot be loaded.
        ConfigError: as in `find_tasks`.
    """
    read_settings(folder)
    manager = manager or find_tasks(tasks, settings)
    trust = settings.trust_remote_code
    loaded = load_causal_lm(folder, getattr(torch, settings.dtype), trust_remote_code=trust)
    model = SingleBosHFLM(
        pretrained=loaded.to(settings.device),
        tokenizer=load_auto_tokenizer(folder, trust_remote_code=trust),
        batch_size=settings.batch_size,
        max_length=settings.max_length_tokens,
    )
    with nullcontext() if trust else templates_without_code():
        results: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            task_manager=manager,
            bootstrap_iters=1000,
        )
    return results


def write_results(path: Path, folder: Path, settings: HarnessSettings, results: Mapping[str, Any]) -> None:
    """Write the results of `run_tasks` on an exported folder as JSON, with the settings and the samples."""
    kept = {key: results[key] for key in ("results", "versions", "n-shot", "n-samples", "configs", "samples")}
    text = json.dumps({"model": str(folder), "settings": settings._asdict(), **kept}, indent=2, default=str)
    write_atomically(path, text.encode() + b"\n")


def results_table(results: dict[str, Any]) -> str:
    """Return the harness's own table."""
    return str(make_table(results))


def _check_known(tasks: Sequence[str], manager: TaskManager) -> None:
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            raise ConfigError(
                f"there is no task {task!r}" + (f"; similar names: {', '.join(near)}" if near else ""),
                remedy="Use a task of lm-evaluation-harness, or add a folder of tasks with --include",
                location="--tasks",
            )
