"""The kinds of evaluations that a follower makes of each checkpoint, by the functions of the other commands.

Their facts identify an evaluation in RUN/evaluations.jsonl, so settings that change its values are among them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_bipe.checkpoint.find import read_data_record
from megatron_bipe.config import RunConfig
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.eval.eval_model import EvalModel, check_compatible, check_length
from megatron_bipe.eval.follow import CheckpointModel, Evaluation
from megatron_bipe.eval.generation import Sampling, continue_texts
from megatron_bipe.eval.perplexity import EvalSettings, evaluate_perplexity
from megatron_bipe.eval.report import empty_texts_fact, finite_or_none
from megatron_bipe.eval.sequences import check_lengths

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from megatron_bipe.eval.harness import HarnessSettings


def perplexities(
    run_dir: Path,
    run: RunConfig,
    datasets: Mapping[str, TokenDataset],
    lengths: Sequence[int],
    settings: EvalSettings,
) -> list[Evaluation]:
    """Return the perplexity on each dataset at each length, after checks that the run's models can be evaluated so.

    Raises:
        BipeError: a dataset is of another tokenizer or segment rule, or too short, or the encoding does not support a
            length.
    """
    record = read_data_record(run_dir)
    source, special = str(run_dir), record.special_in_text
    fingerprint, rule = record.tokenizer.fingerprint, record.rule
    described = EvalModel(run_dir.name, source, nn.Sequential(), run.model, fingerprint, rule, special)
    check_length(described, max(lengths))
    texts = {name: settings.select(dataset) for name, dataset in datasets.items()}
    for name, dataset in datasets.items():
        check_compatible(described, dataset)
        dataset.check_special_in_text(special, source)
        check_lengths(texts[name], lengths, settings.protocol)

    def evaluation(name: str, length: int) -> Evaluation:
        facts = {
            "kind": "perplexity",
            "data": name,
            "length_tokens": length,
            "data_fingerprint": datasets[name].manifest.fingerprint,
            "protocol": settings.protocol,
            "max_tokens": settings.max_tokens,
            **empty_texts_fact(settings),
            "dtype": _name(settings.dtype),
        }

        def measure(model: CheckpointModel) -> dict[str, Any]:
            found = evaluate_perplexity(model.loaded, texts[name], length, settings)
            return {
                "perplexity": finite_or_none(found.perplexity),
                "nats_per_token": found.nats_per_token,
                "bits_per_byte": found.bits_per_byte,
                "num_predictions": found.num_predictions,
            }

        return Evaluation(f"perplexity on {name} at {length} tokens", facts, measure)

    return [evaluation(name, length) for name in datasets for length in lengths]


def harness_tasks(tasks: Sequence[str], settings: "HarnessSettings", manager: "TaskManager") -> list[Evaluation]:
    """Return each task of lm-evaluation-harness as an evaluation; `manager` is that of `find_tasks`."""
    from megatron_bipe.eval.harness import run_tasks

    def evaluation(task: str) -> Evaluation:
        facts = {
            "kind": "harness",
            "task": task,
            "num_fewshot": settings.num_fewshot,
            "limit": settings.limit,
            "max_length_tokens": settings.max_length_tokens,
            "dtype": settings.dtype,
        }

        def measure(model: CheckpointModel) -> dict[str, float]:
            results = run_tasks(model.exported, [task], settings, manager)["results"]
            return dict(_harness_values(results))

        return Evaluation(f"harness task {task}", facts, measure)

    return [evaluation(task) for task in tasks]


def _harness_values(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield names and values of metrics, such as `acc`; of a group or pattern, with the task: `mmlu_law/acc`."""
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, int | float):
                name = metric.removesuffix(",none")  # the name of no filter
                yield (f"{task}/{name}" if len(results) > 1 else name), value


def continuations(prompts: Sequence[str], sampling: Sampling) -> list[Evaluation]:
    """Return the continuation of each prompt as an evaluation."""

    def evaluation(prompt: str) -> Evaluation:
        facts = {
            "kind": "generate",
            "prompt": prompt,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "dtype": _name(sampling.dtype),
        }

        def measure(model: CheckpointModel) -> dict[str, str]:
            [text] = continue_texts(model.exported, [prompt], sampling)
            return {"text": text}

        return Evaluation("continuation", facts, measure)

    return [evaluation(prompt) for prompt in prompts]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
