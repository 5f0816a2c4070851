"""Weights that several ranks hold must stay the same bits; how ranks make sure of it, at little cost.

Ranks compare fingerprints: what they send is 16 bytes a tensor, whatever its size. A difference means that a rank
computed or remembered something wrongly; the losses would not show it for a long time.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_bipe.errors import ReplicaError
from megatron_bipe.parallel.mesh import Mesh

_CHUNK = 1 << 20  # elements at a time: 8 bytes each for a moment
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as int64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 3  # tensors of a rank that a message names


class Copies(NamedTuple):
    """What all ranks of a group hold alike.

    Args:
        group: the ranks.
        kind: which ranks these are, for the message.
        tensors: the same names in the same order on each of them.
    """

    group: ProcessGroup
    kind: str
    tensors: Mapping[str, Tensor]


def fingerprint(x: Tensor) -> Tensor:
    """64 bits that tell a tensor from others, int64 [], on its device.

    The sum of its elements' bits, taken as integers, each times an odd number that depends on its place: another
    element, sign of zero or order gives another sum, and the same bits the same sum on any device, NaN or not.
    """
    bits = x.detach().flatten().view(_INTEGERS[x.element_size()])
    odd = torch.arange(1, 2 * min(_CHUNK, len(bits)), 2, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in bits.split(_CHUNK):
        total = total * _ODD + (odd[: len(part)] * part).sum()
    return total


def check_copies(copies: Sequence[Copies], everyone: ProcessGroup, mesh: Mesh, step: int) -> None:
    """Compare what ranks hold alike; all ranks call this together, and none is left behind by an error.

    Args:
        copies: what this rank holds; ranks of a group list its groups in the same order.
        everyone: all ranks of the launch.
        mesh: this process among them.
        step: updates done, for the message.

    Raises:
        ReplicaError: on all ranks, if any two copies differ; names the ranks that are unlike most others.
    """
    prints = [_fingerprints(held.tensors.values(), mesh.device) for held in copies]
    differs = [_differs(mine, held.group) for mine, held in zip(prints, copies, strict=True)]
    trouble = torch.tensor(any(bool(flags.any()) for flags in differs), dtype=torch.int64, device=mesh.device)
    dist.all_reduce(trouble, dist.ReduceOp.MAX, group=everyone)
    if trouble:
        found = {held.kind: _odd_names(held, mine) for held, mine in zip(copies, prints, strict=True)}
        _raise(found, everyone, mesh, step)


def coordinates(mesh: Mesh) -> str:
    """Where a rank is."""
    return f"rank {mesh.rank} (stage {mesh.stage}, data rank {mesh.data_rank}, tensor rank {mesh.tensor_rank})"


def _fingerprints(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    return torch.stack([fingerprint(x).to(device) for x in tensors])


def _differs(prints_P: Tensor, group: ProcessGroup) -> Tensor:
    """Whether the largest and the smallest of the ranks differ; -1 - x turns the smallest into the largest."""
    both_2P = torch.cat([prints_P, ~prints_P])
    dist.all_reduce(both_2P, dist.ReduceOp.MAX, group=group)
    largest_P, smallest_P = both_2P[: len(prints_P)], ~both_2P[len(prints_P) :]
    return largest_P != smallest_P


def _odd_names(held: Copies, prints_P: Tensor) -> list[str]:
    """Tensors of this rank that are unlike those of most ranks in the group; of all ranks, if there is no majority."""
    gathered = [torch.empty_like(prints_P) for _ in range(held.group.size())]
    dist.all_gather(gathered, prints_P, group=held.group)
    columns = torch.stack(gathered).T.tolist()
    mine = prints_P.tolist()
    return [
        name for name, own, all_ranks in zip(held.tensors, mine, columns, strict=True) if own != _majority(all_ranks)
    ]


def _majority(values: list[int]) -> int | None:
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None


def _raise(found: dict[str, list[str]], everyone: ProcessGroup, mesh: Mesh, step: int) -> None:
    """Tell all ranks of what each found on itself."""
    here = "; ".join(f"{_listed(names)}, unlike other {kind} ranks" for kind, names in found.items() if names)
    reports: list[str | None] = [None] * everyone.size()
    dist.all_gather_object(reports, f"{coordinates(mesh)}: {here}" if here else None, group=everyone)
    raise ReplicaError(
        f"after step {step}, weights of which ranks hold copies are no longer the same bits. "
        + ". ".join(report for report in reports if report),
        remedy="Start the same command again: it continues from the last checkpoint. If it happens again on the same "
        "rank, suspect its hardware and leave its node out",
        place=f"step {step}",
    )


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
