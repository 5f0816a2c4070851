"""Training state on disk: any layout reads what any other layout wrote."""

import hashlib
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.checkpoint.manifest import CHECKSUM_NAME, INDEX, load_index
from megatron_bipe.checkpoint.shard_files import (
    KINDS,
    Fragment,
    StateReader,
    rank_file,
    write_fragments,
    write_index,
)
from megatron_bipe.checkpoint.verify import read_weights
from megatron_bipe.config.load import dump_yaml, load_run_config
from megatron_bipe.errors import CheckpointError
from megatron_bipe.model.layer_factory import Shard
from tests.helpers.checkpoints import checkpoint_info, publish_fragments, write_checkpoint
from tests.helpers.errors import raises

# name -> (unsharded shape, dimension and blocks of the split); the norm is replicated
PARAMETERS = {
    "0.token.weight": ((8, 6), (0, 1)),
    "1.mlp.down.weight": ((6, 8), (1, 1)),
    "1.mlp.gate_up.weight": ((16, 6), (0, 2)),
    "10.norm.weight": ((6,), None),
}


def full_state(name):
    shape = PARAMETERS[name][0]
    generator = torch.Generator().manual_seed(len(name))
    return {kind: torch.randn(shape, generator=generator) for kind in KINDS}


def fragment(name, tensor_rank, tensor, part=0, parts=1):
    split = PARAMETERS[name][1]
    shard = Shard(*split, tensor_rank, tensor) if split and tensor > 1 else None
    state = {kind: shard.select(x) if shard else x for kind, x in full_state(name).items()}
    shape = tuple(state["weight"].shape)
    flat = {kind: x.flatten() for kind, x in state.items()}
    return Fragment(name, shape, shard, 0, flat).part(part, parts)


def held_by_ranks(tensor=1, replicas=1):
    """Return the fragments that ranks write; replicated parameters are those of the first tensor-parallel rank."""
    held = []
    for rank in range(tensor * replicas):
        names = [name for name, (_, split) in PARAMETERS.items() if split or rank % tensor == 0]
        held.append([fragment(name, rank % tensor, tensor, rank // tensor, replicas) for name in names])
    return held


def write(folder, tensor=1, replicas=1):
    folder.mkdir(parents=True, exist_ok=True)
    random = {"cpu": torch.arange(5, dtype=torch.uint8)}
    files = {
        rank_file(rank): write_fragments(folder, rank, held, random)
        for rank, held in enumerate(held_by_ranks(tensor, replicas))
    }
    write_index(folder, checkpoint_info(7)._replace(optimizer_steps=6), files)
    return folder


def test_tensors_of_a_device_are_copied_one_at_a_time(tmp_path, monkeypatch):
    calls, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: calls.append("copy") or real(tensor))
    held = [fragment(name, 0, 1) for name in PARAMETERS]
    write_fragments(tmp_path, 0, held, {}, lambda: calls.append("written"))
    header = 2  # its chunks
    assert calls == ["written"] * header + ["copy", "written"] * len(KINDS) * len(held)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("replicas", [1, 3, 16])
def test_reader_returns_unsharded_parameters_of_any_layout(tmp_path, tensor, replicas):
    reader = StateReader(write(tmp_path, tensor, replicas))
    assert (reader.index.step, reader.index.optimizer_steps) == (7, 6)
    assert list(reader.index.parameters) == list(PARAMETERS)  # in layer order: 10 after 1
    for name in PARAMETERS:
        for kind, expected in full_state(name).items():
            assert torch.equal(reader.full(kind, name), expected)


layouts = st.tuples(st.sampled_from([1, 2]), st.integers(1, 5))


@settings(max_examples=60)
@given(written=layouts, read=layouts, choice=st.data())
def test_reader_returns_each_rank_of_another_layout_its_slice(tmp_path_factory, written, read, choice):
    reader = StateReader(write(tmp_path_factory.mktemp("state"), *written))
    tensor, replicas = read
    rank, part = choice.draw(st.integers(0, tensor - 1)), choice.draw(st.integers(0, replicas - 1))
    for name in PARAMETERS:
        wanted = fragment(name, rank, tensor, part, replicas)
        for kind, expected in wanted.state.items():
            assert torch.equal(reader.run(kind, wanted), expected)


@pytest.mark.parametrize("size", [0, 1, 2, 7])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_fragment_parts_make_it_up_without_gap_or_overlap(size, parts):
    state = {kind: torch.arange(float(size)) for kind in KINDS}
    found = [Fragment("0.x", (size,), None, 5, state).part(index, parts) for index in range(parts)]
    assert torch.equal(torch.cat([part.state["exp_avg"] for part in found]), torch.arange(float(size)))
    for part in found:
        assert torch.equal(part.state["weight"] + 5, torch.arange(part.start, part.start + part.size).float())


def rewrite(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    text = json.dumps(index)
    (folder / INDEX).write_text(text)
    (folder / CHECKSUM_NAME).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {INDEX}\n")


def read_everything(folder):
    reader = StateReader(folder)
    return {name: reader.full(kind, name) for name in reader.index.parameters for kind in KINDS}


def drop_rank(index):
    runs = index["parameters"]["0.token.weight"]["runs"]
    index["parameters"]["0.token.weight"]["runs"] = [run for run in runs if run["tensor_rank"] != 1]


def shift(index):
    index["parameters"]["1.mlp.down.weight"]["runs"][0]["start"] = 1


DAMAGES = {
    "no index": (lambda folder: (folder / INDEX).unlink(), (INDEX,)),
    "no checksum of it": (lambda folder: (folder / CHECKSUM_NAME).unlink(), (CHECKSUM_NAME,)),
    "index cut off": (lambda folder: os.truncate(folder / INDEX, 100), (INDEX, CHECKSUM_NAME)),
    "unknown field": (lambda folder: rewrite(folder, lambda index: index.update(more=1)), (INDEX, "more")),
    "later version": (lambda folder: rewrite(folder, lambda index: index.update(format_version=9)), ("version 9", 2)),
    "shard missing": (lambda folder: rewrite(folder, drop_rank), ("0.token.weight", "[4, 6]")),
    "gap": (lambda folder: rewrite(folder, shift), ("1.mlp.down.weight", "[6, 4]")),
    "file missing": (lambda folder: (folder / rank_file(1)).unlink(), (rank_file(1), "No such file")),
    "file cut off": (lambda folder: os.truncate(folder / rank_file(1), 900), (rank_file(1),)),
    "other file": (lambda folder: (folder / rank_file(0)).write_bytes(b"x" * 64), (rank_file(0),)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_reader_damage_is_one_error_that_names_it(tmp_path, damage):
    folder = write(tmp_path, tensor=2, replicas=2)
    harm, observed = DAMAGES[damage]
    harm(folder)
    with raises(CheckpointError, *observed, location=folder, remedy="RUN_DIR@STEP") as error:
        read_everything(folder)
    assert (CHECKSUM_NAME in error.value.message) == (CHECKSUM_NAME in observed)


def test_reader_file_of_another_checkpoint_is_an_error(tmp_path):
    folder, other = write(tmp_path / "a", replicas=2), write(tmp_path / "b", replicas=3)
    (other / "rank-00001.safetensors").replace(folder / "rank-00001.safetensors")
    with raises(CheckpointError, rank_file(1), "0.token.weight", "[16]", location=folder):
        read_everything(folder)


@pytest.mark.parametrize(
    ("name", "shape", "observed"),
    [("9.other.weight", (6,), ()), ("10.norm.weight", (5,), ("[6]", "[5]"))],
)
def test_reader_parameter_that_does_not_fit_is_an_error(tmp_path, name, shape, observed):
    folder = write(tmp_path)
    reader = StateReader(folder)
    wanted = Fragment(name, shape, None, 0, {"weight": torch.zeros(shape)})
    with raises(CheckpointError, name, *observed, location=folder):
        reader.run("weight", wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_read_weights_are_unsharded_and_in_compute_precision(tmp_path, precision):
    publish_fragments(tmp_path, 7, held_by_ranks(tensor=2))
    run = load_run_config(None, [f"train.precision={precision}"])
    (tmp_path / "config.yaml").write_text(dump_yaml(run))
    weights = read_weights(find_checkpoint(tmp_path))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert list(weights) == list(PARAMETERS)
    for name, weight in weights.items():
        assert torch.equal(weight, full_state(name)["weight"].to(dtype))


def test_reader_gives_each_rank_its_random_states_and_others_none(tmp_path):
    reader = StateReader(write(tmp_path, tensor=2))
    assert reader.random(1)["cpu"].tolist() == [0, 1, 2, 3, 4]
    assert reader.random(2) == {}


@pytest.mark.parametrize("name", [INDEX, CHECKSUM_NAME])
def test_index_any_byte_changed_is_an_error(tmp_path, name):
    folder = write(tmp_path)
    path = folder / name
    content = path.read_bytes()
    load_index(folder)
    for position in range(len(content)):
        for changed in (content[position] ^ 1, content[position] ^ 0x80, 0x20 if content[position] == 0x0A else 0x0A):
            path.write_bytes(content[:position] + bytes([changed]) + content[position + 1 :])
            with raises(CheckpointError, INDEX, CHECKSUM_NAME, location=folder):
                load_index(folder)
    path.write_bytes(content)
    load_index(folder)


def test_read_weights_of_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path):
    folder = write_checkpoint(tmp_path, 7, {"0.token.weight": torch.ones(4, 4)})
    (tmp_path / "config.yaml").write_text(dump_yaml(load_run_config(None, ["train.precision=fp32"])))
    content = bytearray((folder / rank_file(0)).read_bytes())
    content[-1] ^= 1  # where no parser would look
    (folder / rank_file(0)).write_bytes(content)
    with raises(CheckpointError, rank_file(0), hashlib.sha256(content).hexdigest(), location=folder):
        read_weights(find_checkpoint(tmp_path))
