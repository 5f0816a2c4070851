"""Loading of a run configuration: defaults, then a YAML file, then `--set section.key=value`."""

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
    """The sources of a run configuration, for error messages."""

    path: Path | None = None
    """YAML file; None: defaults only."""
    overrides: Sequence[str] = ()
    """`section.key=value` options of the command line."""

    def location(self, message: str) -> str:
        """Return the `--set` options whose keys the message names, or else the YAML file."""
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
        overrides: `section.key=value` strings with YAML values; later ones win.

    Returns:
        The configuration; `model.train_len_tokens` defaults to `train.seq_len_tokens`.

    Raises:
        ConfigError: lists every unknown key (with the nearest known one) and every invalid value.
    """
    values = read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        keys = ", ".join(_overridden(".".join(map(str, entry["loc"])), overrides) for entry in error.errors())
        message = "; ".join(validation_problems(error, RunConfig))
        raise ConfigError(message, location=Sources(path, overrides).location(keys)) from None
    if "train_len_tokens" not in run.model.model_fields_set:
        model = run.model.model_copy(update={"train_len_tokens": run.train.seq_len_tokens})
        run = run.model_copy(update={"model": model})
    return run


def dump_yaml(config: BaseModel) -> str:
    """Return the complete configuration as YAML in schema order; `load_run_config` can read it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted name; an empty mapping has none."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys in a mapping, which PyYAML accepts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} appears twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str = "run configuration") -> dict[str, Any]:
    """Return the mapping in a YAML file; `what` names its kind in errors.

    Raises:
        ConfigError: the file is missing, unreadable or not a mapping, or a key appears twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        existing = sorted(str(p) for p in path.parent.glob("*.yaml"))
        remedy = f"Choose one of {', '.join(existing)}" if existing else "Its folder has no YAML file; check the path"
        raise ConfigError(f"there is no such {what}", remedy=remedy, location=path) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        message = f"cannot read the {what}: {reason}"
        raise ConfigError(message, remedy="Correct the file; examples/ has valid ones", location=path) from None
    if not isinstance(values, dict):
        raise ConfigError(f"a {what} must be a mapping of sections, not a {type(values).__name__}", location=path)
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
            raise ConfigError(f"{section!r} is a value, not a section", location=f"--set {override}")
        values = inner
    try:
        values[leaf] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{text!r} is not a YAML value: {message}", location=f"--set {override}") from None


def _overridden(key: str, overrides: Sequence[str]) -> str:
    """Return the keys of `--set` options in the section `key`, which is unknown, or else `key`."""
    names = [override.partition("=")[0].strip() for override in overrides]
    return ", ".join(name for name in names if name.startswith(f"{key}.")) or key


def validation_problems(error: ValidationError, model: type[BaseModel], section: str = "") -> list[str]:
    """Return a text for each problem that `model`, of the given section, has with its values."""
    prefix = f"{section}." if section else ""
    known = list(_keys(model, prefix))
    return [_problem(entry, known, prefix) for entry in error.errors()]


def _problem(entry: Mapping[str, Any], known: Sequence[str], prefix: str) -> str:
    key = prefix + ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"unknown key {key!r}, did you mean {nearest(key, known)!r}?"
    rule = entry["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not entry["loc"]:  # a rule on several fields; the input is the complete section
        return f"{prefix.rstrip('.')}: {rule}"
    return f"{key}={entry['input']!r}: {rule}"


def nearest(key: str, known: Sequence[str]) -> str:
    """Return the known dotted key most similar to `key`; its last part counts double."""
    return max(known, key=lambda candidate: _similarity(key, candidate))


def _similarity(key: str, candidate: str) -> float:
    full_keys = difflib.SequenceMatcher(None, key, candidate).ratio()
    leaves = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return full_keys + leaves


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for field_name, field in section.model_fields.items():
        name = field.alias or field_name
        yield prefix + name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _keys(inner, f"{prefix}{name}.")
