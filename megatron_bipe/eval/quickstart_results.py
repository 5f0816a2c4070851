"""Reader of the files that a quickstart run writes, for its page. Torch-free."""

import math
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.data.dataset import TokenDataset, open_tokenizer
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.eval.curves import Curve
from megatron_bipe.eval.run_losses import RunLosses, read_losses

T = TypeVar("T")
REMEDY = "Remove the output of that step and run tools/quickstart.py again; it repeats missing steps"


class Result(BaseModel):
    """Perplexity at one sequence length in evaluation/perplexity.json."""

    length_tokens: int
    perplexity: float | None
    """None: infinite."""


class Model(BaseModel):
    """A model in evaluation/perplexity.json."""

    name: str
    num_parameters: int
    train_len_tokens: int
    results: list[Result]

    @property
    def curve(self) -> Curve:
        """Perplexity against sequence length."""
        points = [(r.length_tokens, math.inf if r.perplexity is None else r.perplexity) for r in self.results]
        return Curve(self.name, self.train_len_tokens, points)


class Evaluation(BaseModel):
    """The fields of evaluation/perplexity.json that the page needs."""

    protocol_means: str
    models: list[Model]


class Times(BaseModel):
    """Content of logs/times.json."""

    steps_s: dict[str, float] = {}
    """Seconds by title of the step."""
    total_s: float = 0.0
    """Wall time of all steps; parallel steps count once."""


class Quickstart(NamedTuple):
    """Results of a quickstart run."""

    folder: Path
    evaluation: Evaluation
    runs: list[tuple[RunConfig, RunLosses]]
    """Configuration and losses of each evaluated model, in the order of the evaluation."""
    train: TokenDataset
    valid: TokenDataset
    tokenizer: Tokenizer
    generated: str
    times: Times
    """Empty if they were not recorded."""


def read_quickstart(folder: Path) -> Quickstart:
    """Read the results of a quickstart run.

    Raises:
        BipeError: a file is missing or damaged; the error names it.
    """
    path = folder / "evaluation" / "perplexity.json"
    evaluation = _read_json(path, TypeAdapter(Evaluation))
    if not evaluation.models or not all(model.results for model in evaluation.models):
        raise DataError("the evaluation has no results", remedy=REMEDY, location=path)
    runs = []
    for model in evaluation.models:
        run_dir = folder / "runs" / model.name
        runs.append((load_run_config(run_dir / "config.yaml"), read_losses(run_dir)))
    train, valid = TokenDataset(folder / "data" / "train"), TokenDataset(folder / "data" / "valid")
    times = folder / "logs" / "times.json"
    times_of_steps = _read_json(times, TypeAdapter(Times)) if times.exists() else Times()
    generated = _read_bytes(folder / "generated.txt").decode(errors="replace")
    return Quickstart(folder, evaluation, runs, train, valid, open_tokenizer(valid), generated, times_of_steps)


def _read_json(path: Path, kind: TypeAdapter[T]) -> T:
    try:
        return kind.validate_json(_read_bytes(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"]))
        reason = f"{location}: {first['msg']}" if location else first["msg"]
        raise DataError(f"the file is damaged: {reason}", remedy=REMEDY, location=path) from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", remedy=REMEDY, location=path) from error
