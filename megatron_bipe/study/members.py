"""Members of a study, the folders of their runs, and the check that finished runs differ in the grid and seed alone."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bipe.checkpoint.find import read_data_record, step_folder
from megatron_bipe.config import AUTO, RunConfig, flatten, load_run_config, validate_run
from megatron_bipe.data.manifest import MANIFEST_NAME, Manifest
from megatron_bipe.errors import ConfigError
from megatron_bipe.study.definition import RULE_KEY, SEED_KEY, Study, find_base, read_study, setting_text

DEFAULT_RULE = "reference"
# Fields in which runs of a study may differ from what it plans; the data is compared by its record.
_NOT_COMPARED = ("run_dir", "data.path", "data.valid_path", "data.valid", RULE_KEY, "tracking", "alerts")


class Member(NamedTuple):
    """One combination of the grid's values."""

    name: str
    values: dict[str, str]
    """Its values by the grid's keys."""
    settings: list[str]
    """`section.key=value` of all settings besides folders and seed."""
    run: RunConfig
    """Its run configuration, without folders and seed."""
    lengths: tuple[int, ...]
    """Sequence lengths of the evaluation, ascending."""

    @property
    def rule(self) -> str:
        """Segment rule of its datasets."""
        return self.run.data.segments or DEFAULT_RULE


class Job(NamedTuple):
    """One run: a member with a seed, in the folder of the study."""

    member: Member
    seed: int
    folder: Path
    """Folder of the study."""

    @property
    def name(self) -> str:
        return f"{self.member.name}/seed-{self.seed}"

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint, which exists once the run is done."""
        return step_folder(self.run_dir, self.member.run.train.steps)

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation" / self.name


class Plan(NamedTuple):
    """A study with its members, all of which are possible."""

    study: Study
    base: Path
    members: list[Member]
    makes_data: bool
    """True if the datasets are made in the folder of the study, one for each segment rule."""

    def reference_of(self, member: Member) -> Member | None:
        """Return the member that this one is compared with; None if it is the reference itself, or that is absent."""
        reference = self.study.reference
        if isinstance(reference, dict):
            values = member.values | {key: setting_text(value) for key, value in reference.items()}
            found = [other for other in self.members if other.values == values]
        else:
            found = [other for other in self.members if other.name == reference] if reference else self.members[:1]
        return found[0] if found and found[0] is not member else None

    @property
    def rules(self) -> list[str]:
        """Segment rules of the members, each once."""
        return list(dict.fromkeys(member.rule for member in self.members))

    def jobs(self, folder: Path) -> list[Job]:
        """Return all runs; all members have their first seed before any has its second."""
        return [Job(member, seed, folder) for seed in self.study.seeds for member in self.members]

    def data_folders(self, member: Member, folder: Path) -> tuple[Path, Path]:
        """Return the training and the held-out dataset of a member."""
        if self.makes_data:
            made = rule_folder(folder, member.rule)
            return made / "train", made / "valid"
        return base_folders(member.run)


def rule_folder(folder: Path, rule: str) -> Path:
    """Return the folder of the datasets with this segment rule."""
    return folder / "data" / _safe(rule)


def base_folders(run: RunConfig) -> tuple[Path, Path]:
    """Return the training and the held-out dataset that a run configuration names.

    Raises:
        ConfigError: the run has no validation set, or a blend as training data.
    """
    if not run.data.valid_sets or len(run.data.folders) > 1:
        raise ConfigError(
            "a study needs one training dataset and a held-out one: name data.path and data.valid_path in the base "
            "run, or make both with `data: {corpus: {}}`"
        )
    return run.data.folders[0], next(iter(run.data.valid_sets.values()))


def load_plan(path: Path, settings: Sequence[str] = (), only: Sequence[str] = ()) -> Plan:
    """Read a study and make its members.

    Args:
        path: YAML file.
        settings: further `section.key=value` settings of all members.
        only: names of the members to keep; empty: all.

    Raises:
        ConfigError: lists every problem of the file and of the members' run configurations.
    """
    study, problems = read_study(path)
    if study is None:
        raise ConfigError("; ".join(problems), location=path)
    base, members = find_base(study, path), list[Member]()
    for values in _combinations(study):
        try:
            members.append(_member(study, base, values, settings))
        except ConfigError as error:
            problems.append(f"{member_name(values)}: {error.message}")
    names = [member.name for member in members]
    problems += [f"{name} is the name of two members" for name in sorted(set(names)) if names.count(name) > 1]
    problems += [f"--only {name} is not a member" for name in only if name not in names]
    members = [member for member in members if not only or member.name in only]
    if not members and not problems:
        problems.append("`exclude` leaves no member")
    problems += _problems_of_lengths(study, members)
    if isinstance(study.reference, str) and study.reference not in names:
        problems.append(f"reference={study.reference!r} is not a member; members are {', '.join(names)}")
    makes_data = study.data.corpus is not None or RULE_KEY in study.grid
    if members and study.data.corpus is None:
        try:
            base_folders(members[0].run)
        except ConfigError as error:
            problems.append(error.message)
    if problems:
        raise ConfigError("; ".join(dict.fromkeys(problems)), remedy="Correct the study's file", location=path)
    return Plan(study, base, members, makes_data)


def member_name(values: dict[str, Any]) -> str:
    """Return the name of a member: its values in the grid's order."""
    return "-".join(_safe(setting_text(value)) for value in values.values())


def check_runs(plan: Plan, jobs: Iterable[Job]) -> None:
    """Compare the runs that have started with the plan; folders that do not exist yet are skipped.

    Raises:
        ConfigError: lists the runs and fields that differ.
    """
    problems, precisions = [], dict[str, list[str]]()
    for job in jobs:
        if not (job.run_dir / "config.yaml").is_file():
            continue
        found = load_run_config(job.run_dir / "config.yaml")
        precisions.setdefault(found.train.precision, []).append(job.name)
        problems += [f"{job.name}: {text}" for text in (*_differences(job, found), *_data_differences(plan, job))]
    if len(precisions) > 1:
        texts = (f"{precision} ({names[0]} and {len(names) - 1} more)" for precision, names in precisions.items())
        problems.append(f"train.precision is {' and '.join(texts)}; set it in the study")
    if problems:
        raise ConfigError(
            f"runs of this study differ from it in more than the grid and the seed: {'; '.join(problems)}",
            remedy="Restore the setting, name another --output, or remove these runs to train them again",
            location=plan.base,
        )


def _combinations(study: Study) -> Iterator[dict[str, Any]]:
    for values in product(*study.grid.values()):
        combination = dict(zip(study.grid, values, strict=True))
        if not any(excluded.items() <= combination.items() for excluded in study.exclude):
            yield combination


def _member(study: Study, base: Path, values: dict[str, Any], more: Sequence[str]) -> Member:
    texts = {key: setting_text(value) for key, value in values.items()}
    clash = [setting for setting in more if setting.partition("=")[0].strip() in (*study.grid, SEED_KEY)]
    if clash:
        raise ConfigError(f"--set {clash[0]} would override the study's grid or seeds")
    settings = [*study.settings, *(f"{key}={text}" for key, text in texts.items()), *more]
    run = load_run_config(base, settings)
    validate_run(run, study.launch.ranks)
    multiples = (multiple * run.train.seq_len_tokens for multiple in study.evaluate.multiples)
    longest = run.model.max_seq_len_tokens
    lengths = [length for length in study.evaluate.lengths or multiples if longest is None or length <= longest]
    if not lengths:
        raise ConfigError(f"its encoding supports {longest} tokens, and no length of the evaluation is that short")
    return Member(member_name(values), texts, settings, run, tuple(sorted(lengths)))


def _problems_of_lengths(study: Study, members: Sequence[Member]) -> list[str]:
    supported = {length for member in members for length in member.lengths}
    beyond = [length for length in study.evaluate.lengths if members and length not in supported]
    return (
        [f"evaluate.lengths: no encoding of the study supports {', '.join(map(str, beyond))} tokens"] if beyond else []
    )


def _differences(job: Job, found: RunConfig) -> Iterator[str]:
    planned = job.member.run.model_copy(
        update={"train": job.member.run.train.model_copy(update={"seed": job.seed})},
    )
    here, there = (flatten(run.model_dump(mode="json")) for run in (planned, found))
    for key, value in here.items():
        if key.startswith(_NOT_COMPARED) or value == AUTO or there.get(key) == value:
            continue
        yield f"{key} was {there.get(key)}, and is now {value}"


def _data_differences(plan: Plan, job: Job) -> Iterator[str]:
    if not (job.run_dir / "data.json").is_file():  # it was killed before it wrote its first files
        return
    record = read_data_record(job.run_dir)
    if plan.makes_data and record.rule.spec != job.member.rule:
        yield f"{RULE_KEY} was {record.rule.spec}, and is now {job.member.rule}"
    train, _ = plan.data_folders(job.member, job.folder)
    if (train / MANIFEST_NAME).is_file() and Manifest.load(train).fingerprint != record.fingerprint:
        yield f"it was trained on other data than {train}"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "-", text)
