"""The scripts of tools/ and pretrain.py, called in this process or in forked ranks."""

import importlib.util
import io
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

import pretrain
from megatron_bipe.errors import BipeError
from megatron_bipe.runtime import watchdog
from megatron_bipe.runtime.child_processes import STOP_SIGNALS
from megatron_bipe.runtime.exit_handling import run_rank
from megatron_bipe.runtime.launcher_env import Launch, Rendezvous
from tests.helpers.paths import ROOT
from tests.helpers.ranks import Ended, run_programs


@contextmanager
def script(name: str) -> Iterator[ModuleType]:
    """Import tools/NAME.py, from the repository's root as the working folder; its folder is importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        patch.chdir(ROOT)
        spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "tools" / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def call_tool(name: str, *arguments: object, code: int | None = 0) -> Ended:
    """Call tools/NAME.py with command-line arguments, in this process.

    Args:
        name: of the script, without suffix.
        arguments: made to text.
        code: the exit code that is expected; None: any.
    """
    output = io.StringIO()
    with (
        own_logging(),
        mock.patch.dict(os.environ),
        script(name) as module,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        ended = Ended(module.main(list(map(str, arguments))), output.getvalue())
    assert code in (None, ended.code), ended.output
    return ended


def assert_refuses(
    name: str,
    arguments: Sequence[object],
    kind: type[BipeError],
    *observed: object,
    location: str | Path | None = None,
) -> None:
    """Assert that tools/NAME.py exits with code 2 and one message that reports these values.

    Args:
        name: of the script, without suffix.
        arguments: made to text.
        kind: the type of the error.
        observed: values that the message must report, or names that its remedy must mention.
        location: of the error; a path may be relative to the folder of the location.
    """
    output = call_tool(name, *arguments, code=2).output
    assert "Traceback" not in output, output
    _, begin, message = f"\n{output}".rpartition(f"\n{kind.__name__}: ")
    assert begin, output
    text, _, reported = message.rstrip().removesuffix("]").rpartition("  [")
    for value in observed:
        assert str(value) in text, f"{value!s} is not among what was observed: {output}"
    assert location is None or reported == str(location) or reported.endswith(f"/{location}"), output


@contextmanager
def own_logging() -> Iterator[None]:
    """Let the block configure logging as in a new process, and restore it afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:], level = before
        root.setLevel(level)


def pretrain_error(*arguments: object, num_ranks: int = 1) -> BipeError:
    """Return the error that pretrain.py raises, as rank 0 of a launch, before it starts the engine and its watchdog."""
    args = pretrain.parse_args(_pretrain_arguments(arguments))
    launch = Launch(0, 0, num_ranks, num_ranks, Rendezvous("127.0.0.1", 1))
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.chdir(ROOT)
        accepted = mock.Mock(side_effect=AssertionError("the arguments are accepted"))
        patch.setattr(watchdog.Watchdog, "__init__", accepted)
        with pytest.raises(BipeError) as caught:
            pretrain.main(args, launch)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return caught.value


def run_pretrain(
    arguments: Sequence[object], folder: Path, num_ranks: int = 1, *, code: int | None = 0, **more: object
) -> list[Ended]:
    """Run pretrain.py in a forked process for each rank, as a launcher would; logs go to `folder`.

    Args:
        arguments: of pretrain.py, made to text; `--ds_config ds_configs/zero2.json` unless they name one.
        folder: of the ranks' logs.
        num_ranks: of the launch.
        code: the exit code that all ranks are expected to have; None: any.
        more: as `run_programs` takes it.
    """
    function, *given = pretrain_program(arguments)
    ended = run_programs(function, given, folder, num_ranks, **more)  # type: ignore[arg-type]
    assert code is None or {rank.code for rank in ended} == {code}, "\n".join(rank.output for rank in ended)
    return ended


def pretrain_program(arguments: Sequence[object]) -> tuple[Callable[[list[str]], None], list[str]]:
    """Return pretrain.py with its arguments as `start_program` takes them."""
    return _pretrain, _pretrain_arguments(arguments)


def _pretrain(arguments: Sequence[str]) -> None:
    run_rank(pretrain.main, pretrain.parse_args(arguments))


def _pretrain_arguments(arguments: Sequence[object]) -> list[str]:
    texts = list(map(str, arguments))
    return texts if "--ds_config" in texts else ["--ds_config", "ds_configs/zero2.json", *texts]
