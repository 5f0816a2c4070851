"""Exit codes of errors: which ones the user must fix, and which ones may pass by themselves."""

import errno
import os
import pickle

import pytest

from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.errors import BipeError, DataError, DivergenceError, HealthError, exit_code


def test_exit_code_is_2_only_for_what_the_user_can_fix():
    assert exit_code(ValueError("a defect")) == exit_code(DataError("busy", transient=True)) == 1
    assert exit_code(DataError("damaged")) == exit_code(HealthError("again")) == exit_code(DivergenceError("x")) == 2


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ESTALE, 1), (errno.EIO, 1), (errno.ETIMEDOUT, 1), (errno.EACCES, 2), (errno.ENOSPC, 2)]
)
def test_exit_code_of_a_failed_read_depends_on_whether_it_may_succeed_later(monkeypatch, tmp_path, number, code):
    """Every reader's error counts, also with `from None`, and in another process."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    for method in ("read_bytes", "read_text", "open"):
        monkeypatch.setattr(f"pathlib.Path.{method}", fail)
    for read, argument in ((Manifest.load, tmp_path), (load_run_config, tmp_path / "run.yaml")):
        with pytest.raises(BipeError) as caught:
            read(argument)
        assert exit_code(caught.value) == exit_code(pickle.loads(pickle.dumps(caught.value))) == code
