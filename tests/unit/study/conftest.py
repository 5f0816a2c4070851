"""Studies of small runs that no test trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bipe.config import dump_yaml
from megatron_bipe.data.manifest import DataRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.study import Job, Plan, load_plan
from megatron_bipe.text_table import csv_text

BASE = {
    "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "ffn_size": 48, "vocab_size": 64},
    "optimizer": {"warmup_steps": 0},
    "train": {"steps": 4, "seq_len_tokens": 16, "global_batch": 4, "micro_batch": 4},
}
STUDY = {
    "title": "Two encodings",
    "base": "base.yaml",
    "grid": {"model.encoding": ["rope", "bipe_rope"]},
    "data": {"corpus": {}},
    "evaluate": {"multiples": [1, 2]},
}

WriteStudy = Callable[..., Path]
WriteRun = Callable[..., None]
WriteLosses = Callable[..., None]


@pytest.fixture
def write_study(tmp_path: Path) -> WriteStudy:
    """Write base.yaml and study.yaml, the latter with changed keys; None removes a key."""

    def write(**changes: Any) -> Path:
        values = {key: value for key, value in (STUDY | changes).items() if value is not None}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


@pytest.fixture
def plan(write_study: WriteStudy) -> Plan:
    return load_plan(write_study())


@pytest.fixture
def write_run() -> WriteRun:
    """Write the folder of a run as its training leaves it, with changed settings."""

    def write(job: Job, rule: str = "reference", seed: int | None = None, **train: Any) -> None:
        job.checkpoint.mkdir(parents=True)
        known = job.member.run.train.model_dump() | {"seed": job.seed if seed is None else seed, "precision": "fp32"}
        run = job.member.run
        run = run.model_copy(update={"train": run.train.model_copy(update=known | train)})
        (job.run_dir / "config.yaml").write_text(dump_yaml(run))
        tokenizer = TokenizerRecord(name="test", fingerprint="a" * 64, vocab_size=64, special_ids={})
        record = DataRecord(tokenizer=tokenizer, rule=SegmentRule(spec=rule, token_ids=(1,)), fingerprint="b" * 64)
        (job.run_dir / "data.json").write_text(record.model_dump_json())

    return write


@pytest.fixture
def write_losses() -> WriteLosses:
    """Write the evaluation of a run: the losses of its documents by length, with 10 predictions each."""

    def write(job: Job, nats: dict[int, list[float]], num_predictions: int = 10) -> None:
        columns = ("subset", "model", "length_tokens", "document", "nats", "num_predictions")
        rows = [
            ("valid", "model", length, document, value, num_predictions)
            for length, values in nats.items()
            for document, value in enumerate(values)
        ]
        job.evaluation.mkdir(parents=True, exist_ok=True)
        (job.evaluation / "documents.csv").write_text(csv_text([columns, *rows]))

    return write
