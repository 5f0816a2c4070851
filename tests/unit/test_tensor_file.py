"""Files of ranks are safetensors files, and the returned checksum is that of the file."""

import errno
import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_bipe import tensor_file
from megatron_bipe.tensor_file import write_tensors

TENSORS = {
    "a": torch.arange(7.0),
    "empty": torch.empty(0),
    "b": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize("names", [[], ["a"], ["a", "b", "bytes"], ["empty", "b"], [*TENSORS]])
def test_write_tensors_is_read_back_by_the_library(tmp_path, monkeypatch, names, chunk):
    monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", chunk)
    tensors = {name: TENSORS[name] for name in names}
    record = write_tensors(tmp_path / "x", tensors, {"about": "it", "quotes": '"\u00e9'})
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"about": "it", "quotes": '"\u00e9'}
    content = (tmp_path / "x").read_bytes()
    assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_tensors_requests_one_at_a_time_in_the_given_type(tmp_path, dtype):
    asked = []

    class Reads(dict):
        def __getitem__(self, name):
            asked.append((name, (tmp_path / "x").stat().st_size))
            return super().__getitem__(name)

    tensors = {name: torch.randn(300, 40).to(dtype) for name in "ab"}
    like = {name: tensors[name].to("meta") for name in "ba"}
    write_tensors(tmp_path / "x", like, {}, Reads(tensors).__getitem__)
    (first, at_first), (second, at_second) = asked
    assert (first, second) == ("b", "a") and at_second - at_first == tensors["b"].nbytes
    found = load_file(tmp_path / "x")
    assert all(found[name].dtype == dtype and torch.equal(found[name], tensors[name]) for name in "ab")


def test_write_tensors_other_type_is_refused(tmp_path):
    with pytest.raises(KeyError):
        write_tensors(tmp_path / "x", {"a": torch.ones(2, dtype=torch.int64)}, {})


def test_write_tensors_disk_that_takes_a_part_is_asked_again(tmp_path, monkeypatch):
    """A nearly full disk makes a short write, then an error."""
    real = tensor_file.Path.open

    class Nearly:
        def __init__(self, stream):
            self.stream, self.left = stream, 100

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, view):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = self.stream.write(view[: min(self.left, 30)])
            self.left -= count
            return count

    monkeypatch.setattr(tensor_file.Path, "open", lambda path, *args, **kwargs: Nearly(real(path, *args, **kwargs)))
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(1000)}, {})
    assert (tmp_path / "x").stat().st_size == 100
