"""A study as its YAML file defines it: a base run, a grid of settings, seeds, the data and the evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from megatron_bipe.config import Positive, Section, read_yaml, validation_problems
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.sequences import DEFAULT_PROTOCOL, Protocol

SEED_KEY, RULE_KEY = "train.seed", "data.segments"
# Keys that the study sets for each run.
OWN_KEYS = ("run_dir", SEED_KEY, "data.path", "data.valid_path")


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    texts = list(map(setting_text, values))
    repeated = sorted({text for text in texts if texts.count(text) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is named more than once")
    return values


Length = Annotated[int, Field(ge=2)]
Values = Annotated[tuple[Any, ...], Field(min_length=1), AfterValidator(_each_once)]


class Corpus(Section):
    """Text of the installed packages, as tools/corpus.py collects it, and a tokenizer trained on it."""

    vocab_size: Positive | None = None
    """Size of the tokenizer's vocabulary; null: the base's model.vocab_size."""
    max_bytes: Positive | None = None
    """Cap of each subset of the text; null: the default of tools/corpus.py."""
    valid_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the text that is held out; null: the default of tools/corpus.py."""


class StudyData(Section):
    """Datasets of the study."""

    corpus: Corpus | None = None
    """Make the datasets from text of the installed packages; null: use those of the base run."""


class Launch(Section):
    """How a run is launched."""

    command: str | None = None
    """Words before `pretrain.py`; null: python for one rank on a CPU, else DeepSpeed's launcher."""
    ds_config: Path = Path("ds_configs/zero1.json")
    """DeepSpeed settings of the runs."""
    ranks: Positive = 1
    """Ranks of a run; one by default, so that results do not depend on the machine."""


class Evaluate(Section):
    """Evaluation of each trained model on the held-out text."""

    lengths: Annotated[tuple[Length, ...], AfterValidator(_each_once)] = ()
    """Sequence lengths in tokens; empty: `multiples`."""
    multiples: Annotated[tuple[Positive, ...], AfterValidator(_each_once)] = (1, 2, 3, 4, 6, 8)
    """Sequence lengths in multiples of the training length, used if `lengths` is empty."""
    max_tokens: Positive | None = None
    """Evaluate on full documents, spread evenly, of at most so many tokens; null: on all."""
    protocol: Protocol = DEFAULT_PROTOCOL
    """How the text is cut into sequences; see tools/evaluate.py."""


class Study(Section):
    """A comparison of runs that differ in the grid's settings and the seed alone."""

    title: Annotated[str, Field(min_length=1)]
    """Title of the plot and the page."""
    base: Path
    """Run configuration that all members begin with, relative to the study's file or to the working folder."""
    set: dict[str, Any] = Field(default={})
    """Settings of all members, by `section.key`."""
    grid: Annotated[dict[str, Values], Field(min_length=1)]
    """Values of each setting that is compared, by `section.key`; members are all combinations."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations that are not members: a member with all values of one of these mappings is dropped."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_each_once)] = (
        1,
        2,
        3,
    )
    """Values of train.seed, each of which every member is trained with. Three is the least that shows a spread."""
    data: StudyData = StudyData()
    """The datasets."""
    launch: Launch = Launch()
    """The launch of each run."""
    evaluate: Evaluate = Evaluate()
    """The evaluation."""
    reference: str | dict[str, Any] | None = None
    """Member that the others are compared with, document by document, by its name. Values of the grid, such as
    `{data.segments: reference}`, compare each member with the one that has these and otherwise its own values. Null:
    the first member."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        problems = [
            f"{key} is set by the study itself, for each run"
            for key in [*self.set, *self.grid]
            if key in OWN_KEYS or key.startswith("data.valid")
        ]
        problems += [f"{key} is in `set` and in `grid`" for key in self.set if key in self.grid]
        for values in self.exclude:
            unknown = [key for key in values if key not in self.grid]
            problems += [
                f"exclude names {key}, which is not in the grid" for key in unknown or ([] if values else ["{}"])
            ]
        named = self.reference.items() if isinstance(self.reference, dict) else ()
        problems += [
            f"reference: {key}={setting_text(value)} is not in the grid"
            for key, value in named
            if value not in self.grid.get(key, ())
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def settings(self) -> list[str]:
        """Return `set` as `--set` options take it."""
        return [f"{key}={setting_text(value)}" for key, value in self.set.items()]


def setting_text(value: Any) -> str:
    """Return a value as `--set KEY=VALUE` and names of members have it."""
    if isinstance(value, str):
        return value if yaml.safe_load(value) == value else json.dumps(value)
    return json.dumps(value)


def read_study(path: Path) -> tuple[Study | None, list[str]]:
    """Read the file of a study.

    Returns:
        The study, without the keys that have a problem, or None if it has no meaning without them; and the problems.

    Raises:
        ConfigError: the file is missing, or not a YAML mapping.
    """
    values = read_yaml(path, "study")
    try:
        return Study.model_validate(values), []
    except ValidationError as error:
        wrong = {entry["loc"][0] if entry["loc"] else "" for entry in error.errors()}
        return _without(values, wrong), validation_problems(error, Study)


def find_base(study: Study, path: Path) -> Path:
    """Return the base run's file: relative to the study's file if it is there, else to the working folder.

    Raises:
        ConfigError: it is in neither.
    """
    candidates: Sequence[Path] = (path.parent / study.base, study.base)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"there is no base run {study.base}", remedy="Name a run configuration, such as one of examples/", location=path
    )


def _without(values: dict[str, Any], wrong: set[Any]) -> Study | None:
    """Return the study that the other keys define, so that one error can list the problems of both."""
    if wrong & {"", "base", "grid", "title"}:
        return None
    try:
        return Study.model_validate({key: value for key, value in values.items() if key not in wrong})
    except ValidationError:
        return None
