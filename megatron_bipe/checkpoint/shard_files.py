"""The files of a checkpoint: the training state of every parameter, in fragments that are independent of the layout.

    rank-00000.safetensors   written by one rank: for each fragment and kind of state a flat fp32 tensor NAME:KIND, and
                             the states of its random number generators

A fragment is a contiguous slice of one flattened parameter, or of its tensor-parallel shard, as the writing rank held
it. A reader of any layout requests the slice that it needs. docs/checkpoints.md describes the bytes.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bipe.checkpoint.manifest import (
    FORMAT_VERSION,
    INDEX,
    CheckpointInfo,
    CheckpointManifest,
    SavedParameter,
    SavedRun,
    load_index,
    save_index,
    unusable_checkpoint,
)
from megatron_bipe.data.manifest import FileRecord
from megatron_bipe.errors import CheckpointError
from megatron_bipe.model import Shard
from megatron_bipe.tensor_file import write_tensors

WEIGHT = "weight"
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")  # torch's Adam uses these names for its moments

_ABOUT = "fragments"  # metadata key of a file, for the part of the index that describes this file
_RANDOM = "random"


class Fragment(NamedTuple):
    """A contiguous slice of a parameter's elements."""

    name: str  # parameter name in the plan
    shape: tuple[int, ...]  # shape of the parameter on its rank: unsharded or of the shard
    shard: Shard | None  # tensor-parallel shard; None if unsharded
    start: int  # first element in the flattened parameter on its rank
    state: Mapping[str, Tensor]  # by kind: flat fp32 views of the optimizer's tensors, all of the same length
    is_copy: bool = False  # True for the copy of a tied parameter that another pipeline stage owns

    @property
    def size(self) -> int:
        return self.state[WEIGHT].numel()

    def part(self, index: int, parts: int) -> "Fragment":
        """Return the `index`-th of `parts` contiguous slices of nearly equal size."""
        start, stop = self.size * index // parts, self.size * (index + 1) // parts
        return self._replace(start=self.start + start, state={key: x[start:stop] for key, x in self.state.items()})


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_fragments(
    folder: Path,
    rank: int,
    fragments: Sequence[Fragment],
    random: Mapping[str, Tensor],
    advance: Callable[[], None] = lambda: None,
) -> FileRecord:
    """Write the file of one rank, and sync it to the disk.

    Args:
        folder: folder of the checkpoint.
        rank: rank that the file is named after.
        fragments: the rank's fragments; tensors on a GPU are copied to CPU memory one at a time.
        random: states of random number generators by name, uint8 [bytes].
        advance: called after each chunk.
    """
    path = folder / rank_file(rank)
    held = [fragment for fragment in fragments if fragment.size]
    tensors = {f"{f.name}:{kind}": f.state[kind].detach() for f in held for kind in KINDS}
    tensors |= {f"{_RANDOM}:{name}": state for name, state in random.items()}
    info = {f.name: _saved(f, path.name).model_dump() for f in held}
    written = write_tensors(path, tensors, {_ABOUT: json.dumps(info)}, lambda name: tensors[name].cpu(), advance)
    return FileRecord(**written._asdict())


def write_index(folder: Path, info: CheckpointInfo, files: Mapping[str, FileRecord]) -> None:
    """Write the index of all ranks' files, which must exist."""
    parameters: dict[str, SavedParameter] = {}
    for name in sorted(files):  # not a folder listing, which may be stale on a network file system
        for parameter, here in _parameters_in(folder / name):
            others = parameters[parameter].runs if parameter in parameters else ()
            parameters[parameter] = here.model_copy(update={"runs": (*others, *here.runs)})
    ordered = {name: parameters[name] for name in sorted(parameters, key=_plan_order)}
    save_index(
        folder,
        CheckpointManifest(format_version=FORMAT_VERSION, **info._asdict(), files=dict(files), parameters=ordered),
    )


def _parameters_in(path: Path) -> Iterable[tuple[str, SavedParameter]]:
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()[_ABOUT])
    return [(name, SavedParameter(**values)) for name, values in info.items()]


class StateReader:
    """A reader of training state from a checkpoint's files, for any layout.

    Raises:
        CheckpointError: the index is missing, damaged or of another version, or fragments are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self.index = load_index(folder)
        for name, saved in self.index.parameters.items():
            self._check_complete(name, saved)

    def run(self, kind: str, fragment: Fragment) -> Tensor:
        """Return the state of one kind for a fragment of any layout, flat fp32 on the CPU.

        Raises:
            CheckpointError: the parameter is missing, has another shape, or its file is damaged.
        """
        saved = self._parameter(fragment)
        stop = fragment.start + fragment.size
        rank, ranks = (fragment.shard.rank, fragment.shard.ranks) if fragment.shard else (0, 1)
        if ranks == saved.ranks:
            return self._elements(kind, fragment.name, rank, fragment.start, stop)
        full = self.full(kind, fragment.name)
        return (fragment.shard.select(full) if fragment.shard else full).flatten()[fragment.start : stop]

    def full(self, kind: str, name: str) -> Tensor:
        """Return the state of one kind of an unsharded parameter in its own shape, fp32 on the CPU."""
        saved = self.index.parameters[name]
        count = torch.Size(saved.shape).numel()
        parts = [self._elements(kind, name, rank, 0, count).view(saved.shape) for rank in range(saved.ranks)]
        shard = saved.shard()
        return shard.join(parts) if shard else parts[0]

    def random(self, rank: int) -> dict[str, Tensor]:
        """Return the generator states of a rank by name, or none if no such rank wrote the checkpoint."""
        if rank_file(rank) not in self.index.files:
            return {}
        file = self._open(rank_file(rank))
        keys = [key for key in file.keys() if key.startswith(f"{_RANDOM}:")]  # noqa: SIM118
        return {key.partition(":")[2]: file.get_tensor(key) for key in keys}

    def _parameter(self, fragment: Fragment) -> SavedParameter:
        saved = self.index.parameters.get(fragment.name)
        if saved is None:
            raise self._error(f"it has no parameter {fragment.name}")
        shapes = [
            shard.full_shape(shape) if shard else list(shape)
            for shard, shape in ((saved.shard(), saved.shape), (fragment.shard, fragment.shape))
        ]
        if shapes[0] != shapes[1]:
            raise self._error(f"{fragment.name} has shape {shapes[0]} there and {shapes[1]} in this run")
        return saved

    def _elements(self, kind: str, name: str, rank: int, start: int, stop: int) -> Tensor:
        """Read elements of a shard from all files that contain any of them; only these bytes are read."""
        parts = []
        for run in sorted(self.index.parameters[name].runs, key=lambda run: run.start):
            first, last = max(start, run.start), min(stop, run.start + run.size)
            if run.tensor_rank == rank and first < last:
                parts.append(self._read(run, f"{name}:{kind}", first - run.start, last - run.start))
        return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0), *parts])

    def _read(self, run: SavedRun, key: str, start: int, stop: int) -> Tensor:
        try:
            found: Tensor = self._open(run.file).get_slice(key)[start:stop]
        except (OSError, SafetensorError) as error:
            raise self._error(f"{run.file} cannot be read: {error}") from error
        if found.dtype != torch.float32 or found.shape != (stop - start,):
            raise self._error(
                f"{run.file} has {found.dtype} {list(found.shape)} for {key}, which disagrees with {INDEX}"
            )
        return found

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise self._error(f"{name} cannot be read: {error}") from error
        return self._files[name]

    def _check_complete(self, name: str, saved: SavedParameter) -> None:
        for rank in range(saved.ranks):
            reached = 0
            for run in sorted((run for run in saved.runs if run.tensor_rank == rank), key=lambda run: run.start):
                if run.start != reached:
                    break
                reached += run.size
            if reached != torch.Size(saved.shape).numel():
                raise self._error(f"shard {rank} of {name}, of shape {list(saved.shape)}, ends at element {reached}")

    def _error(self, seen: str) -> CheckpointError:
        return unusable_checkpoint(self.folder, seen)


def _saved(fragment: Fragment, file: str) -> SavedParameter:
    shard = fragment.shard
    run = SavedRun(file=file, tensor_rank=shard.rank if shard else 0, start=fragment.start, size=fragment.size)
    split = {"dim": shard.dim, "blocks": shard.blocks, "ranks": shard.ranks} if shard else {}
    return SavedParameter(shape=fragment.shape, **split, runs=(run,))


def _plan_order(name: str) -> tuple[int, str]:
    layer, _, rest = name.partition(".")
    return int(layer), rest


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return torch's RNG states of the CPU and of the device, uint8 [bytes]; training draws no random numbers yet."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore saved RNG states; a generator without a saved state is not changed."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
