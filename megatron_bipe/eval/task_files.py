"""Task files of lm-evaluation-harness: what code they name, and their templates without access to Python.

The files are read as the harness reads them, into nodes of YAML: a search in their text would miss other spellings of
a tag or key, and included files of any name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils

from megatron_bipe.errors import ConfigError
from megatron_bipe.io import check_inner_name

_REMEDY = "Read that code, then add --trust-remote-code"
_DATA = ("str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp", "binary", "value", "omap", "set")
_DATA_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in _DATA}


def refuse_code(folder: Path) -> None:
    """Raise ConfigError if a task file names Python code, or a file outside its folder, which might.

    That is: a tag, such as `!function`, a `metric` that is a path, or an `include` that leaves the folder.
    """
    pending = sorted(folder.rglob("*.y*ml"))
    for file in pending:  # which grows by the files that they include
        try:
            with file.open("rb") as content:
                nodes = [node for root in yaml.compose_all(content, yaml.SafeLoader) for node in _all_nodes(root)]
        except (yaml.YAMLError, OSError, ValueError) as error:
            what = f"the task file cannot be read: {' '.join(str(error).split())}"
            raise ConfigError(what, remedy="Fix or remove it", location=file) from error
        for node in nodes:
            if node.tag not in _DATA_TAGS:
                raise _names_code(file, f"{node.tag} {node.value}")
        for key, value in _entries(nodes):
            if key == "metric" and not set("/\\").isdisjoint(str(value)):
                raise _names_code(file, f"metric: {value}")
            if key == "include":
                try:
                    included = file.parent / check_inner_name(value if isinstance(value, str) else "")
                except ValueError as error:
                    raise _names_code(file, f"include: {value}") from error
                pending += [included] if included not in pending else []


def _names_code(file: Path, named: str) -> ConfigError:
    what = f"the task file names code, or a file outside its folder: {named}"
    return ConfigError(what, remedy=_REMEDY, location=file)


def _all_nodes(root: yaml.Node) -> list[yaml.Node]:
    """Return a node and all nodes below it, each once."""
    found, pending = {id(root): root}, [root]
    while pending:
        value = pending.pop().value
        parts = [part for item in value for part in (item if isinstance(item, tuple) else (item,))]
        for part in parts if not isinstance(value, str) else ():
            if id(part) not in found:
                found[id(part)] = part
                pending.append(part)
    return list(found.values())


def _entries(nodes: list[yaml.Node]) -> Iterator[tuple[str, object]]:
    """Yield the keys of all mappings with their values: the text, or for a list its texts."""
    for mapping in nodes:
        for key, value in mapping.value if isinstance(mapping, yaml.MappingNode) else ():
            is_list = isinstance(value, yaml.SequenceNode)
            yield key.value, [item.value for item in value.value] if is_list else value.value


@contextmanager
def templates_without_code() -> Iterator[None]:
    """Let the harness render templates in a sandbox, without Python's private attributes.

    Raises:
        ConfigError: a template uses them.
    """
    before = utils.env
    utils.env = SandboxedEnvironment(undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline)
    utils.env.filters.update(before.filters)
    try:
        yield
    except SecurityError as error:
        what = f"a template of a task calls Python code: {error}"
        raise ConfigError(what, remedy=_REMEDY, location="--tasks") from error
    finally:
        utils.env = before
