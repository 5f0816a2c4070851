"""Where a run configuration comes from: defaults, then a YAML file, then `--set section.key=value`."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.errors import ConfigError


class Sources(NamedTuple):
    """Where the values of a run configuration came from, for error messages."""

    path: Path | None = None
    """YAML file; None: the defaults."""
    overrides: Sequence[str] = ()
    """`section.key=value` of the command line."""

    def location(self, message: str) -> str:
        """Return the `--set` options whose keys the message names; the YAML file where it names none of them."""
        keys = {override: re.escape(override.partition("=")[0].strip()) for override in self.overrides}
        named = [override for override, key in keys.items() if re.search(rf"(?<![\w.]){key}(?!\.?\w)", message)]
        named = named or [override for override, key in keys.items() if re.search(rf"(?<![\w.]){key}\.\w", message)]
        if named or self.path is None:
            return " ".join(f"--set {override}" for override in named) or "--set"
        return str(self.path)


def load_run_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and type-check a run configuration.

    Args:
        path: YAML file that mirrors `RunConfig`; None for the defaults.
        overrides: `section.key=value` texts, values in YAML; later ones win.

    Returns:
        The configuration; `model.train_len_tokens` follows `train.seq_len_tokens` where it is not given.

    Raises:
        ConfigError: names every unknown key (with the nearest known one) and every bad value at once.
    """
    values = _read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        known = list(_keys(RunConfig))
        keys = ", ".join(".".join(map(str, entry["loc"])) for entry in error.errors())
        message = "; ".join(_problem(entry, known) for entry in error.errors())
        raise ConfigError(message, location=Sources(path, overrides).location(keys)) from None
    if "train_len_tokens" not in run.model.model_fields_set:
        model = run.model.model_copy(update={"train_len_tokens": run.train.seq_len_tokens})
        run = run.model_copy(update={"model": model})
    return run


def dump_yaml(config: BaseModel) -> str:
    """The configuration as YAML, complete, in schema order; `load_run_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Refuses what YAML forbids and its library lets pass: a key that is twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        beside = sorted(str(p) for p in path.parent.glob("*.yaml"))
        found = f"there are {', '.join(beside)}" if beside else "there is no YAML file in that folder"
        raise ConfigError(
            "no such run configuration", remedy=f"Name an existing file: {found}", location=path
        ) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        what = f"cannot read the run configuration: {message}"
        raise ConfigError(what, remedy="Correct the file: it is YAML, as in examples/", location=path) from None
    if not isinstance(values, dict):
        raise ConfigError(f"a run configuration is a mapping of sections, not a {type(values).__name__}", location=path)
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(
            f"{override!r} has no '='", remedy="Write --set section.key=value", location=f"--set {override}"
        )
    *sections, leaf = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{section!r} holds a value, not a section", location=f"--set {override}")
        values = inner
    try:
        values[leaf] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{text!r} is not a YAML value: {message}", location=f"--set {override}") from None


def _problem(entry: Mapping[str, Any], known: Sequence[str]) -> str:
    key = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"unknown key {key!r}, did you mean {nearest(key, known)!r}?"
    return f"{key}={entry['input']!r}: {entry['msg'].removeprefix('Value error, ')}"


def nearest(key: str, known: Sequence[str]) -> str:
    """The known dotted key most like `key`, its last part counting double."""
    return max(known, key=lambda candidate: _likeness(key, candidate))


def _likeness(key: str, candidate: str) -> float:
    whole = difflib.SequenceMatcher(None, key, candidate).ratio()
    leaves = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return whole + leaves


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _keys(inner, f"{prefix}{name}.")
