"""Fixtures for tests of several folders."""

import gc
import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.tokenizer import Tokenizer
from tests.helpers import datasets, ranks
from tests.helpers.commands import TEXTS

hypothesis.settings.register_profile("loaded machine", deadline=None)
hypothesis.settings.load_profile("loaded machine")


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Manifest]:
    return datasets.write_dataset


@pytest.fixture(scope="session")
def write_text_dataset() -> Callable[..., Manifest]:
    return datasets.write_text_dataset


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer with one token per character, BOS and EOS."""
    return datasets.write_letters(tmp_path_factory.mktemp("letters"), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def text_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small dataset with a character tokenizer; tests do not change it."""
    folder = tmp_path_factory.mktemp("text")
    datasets.write_text_dataset(folder, TEXTS)
    return folder


@pytest.fixture(scope="session")
def train_and_valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the datasets `train` and `valid`; tests do not change it."""
    return datasets.write_train_and_valid(tmp_path_factory.mktemp("train-and-valid"))


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Return a function that returns an unused TCP port."""
    return ranks.free_port


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/messages.txt")


def pytest_configure() -> None:
    """Let tests and their child processes obey SIGINT and SIGHUP, which a script's background or nohup ignores."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let collections skip what was loaded with the tests, torch's modules above all: each would else take 0.3 s."""
    gc.collect()
    gc.freeze()
