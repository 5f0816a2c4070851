"""Weights that several ranks hold must stay the same bits; how ranks make sure of it, at little cost.

Ranks compare hashes: what they send is 16 bytes a tensor, whatever its size. A difference means that a rank computed or
remembered something wrongly; the losses would not show it for a long time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_bipe.errors import DivergenceError

_CHUNK = 1 << 20  # elements at a time: 8 bytes each for a moment
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, its bits well mixed: 2^64 over the golden ratio, as int64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 3  # tensors that a message names


class Replicas(NamedTuple):
    """What all ranks of a group hold alike.

    Args:
        ranks: what they are to each other, for the message.
        group: the ranks.
        tensors: the same names in the same order on each of them.
    """

    ranks: str
    group: ProcessGroup
    tensors: Mapping[str, Tensor]


def check_replicas(checks: Sequence[Replicas], step: int) -> None:
    """Compare what ranks hold alike; all ranks of the launch call this together.

    Args:
        checks: what this rank holds; ranks of a group list their groups in the same order.
        step: updates done, for the message.

    Raises:
        DivergenceError: on all ranks, if any two replicas differ; names the ranks that are unlike most of their group.
    """
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    hashes = [bits_hash(check.tensors.values()).to(device) for check in checks]
    differ = [_differ(hashes_N, check.group) for check, hashes_N in zip(checks, hashes, strict=True)]
    trouble = torch.tensor(int(any(differ)), device=device)
    dist.all_reduce(trouble, dist.ReduceOp.MAX)  # a group that is alike must not go on without the others
    if trouble:
        reports = [line for check, hashes_N in zip(checks, hashes, strict=True) for line in _report(check, hashes_N)]
        _raise(reports, step)


def bits_hash(tensors: Iterable[Tensor]) -> Tensor:
    """64 bits for each tensor, int64 [N], on the device of the first.

    The sum of a tensor's elements, their bits taken as integers, each times an odd number that depends on its place:
    another element, sign of zero or order gives another sum, and the same bits the same sum on any device, NaN or not.
    """
    hashes = [_bits_hash(tensor) for tensor in tensors]
    return torch.stack([one.to(hashes[0].device) for one in hashes])


def _bits_hash(tensor: Tensor) -> Tensor:
    bits = tensor.detach().flatten().view(_INTEGERS[tensor.element_size()])
    odd = torch.arange(min(_CHUNK, len(bits)), device=bits.device) * 2 + 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK]
        total = total * _FACTOR + (odd[: len(part)] * part).sum()  # modulo 2^64
    return total


def _differ(hashes_N: Tensor, group: ProcessGroup) -> bool:
    """Whether the largest and the smallest of the ranks do; ~x = -1 - x turns the smallest into the largest."""
    both_2N = torch.cat([hashes_N, ~hashes_N])
    dist.all_reduce(both_2N, dist.ReduceOp.MAX, group=group)
    return not torch.equal(both_2N[: len(hashes_N)], ~both_2N[len(hashes_N) :])


def _report(check: Replicas, hashes_N: Tensor) -> list[str]:
    """Which ranks of a group are unlike most of it, and in what; a line from the first of its ranks, none elsewhere."""
    ranks = dist.get_process_group_ranks(check.group)
    of_ranks = [torch.empty_like(hashes_N) for _ in ranks]
    dist.all_gather(of_ranks, hashes_N, group=check.group)
    if check.group.rank() != 0:
        return []
    names_of = defaultdict(list)
    for name, column in zip(check.tensors, torch.stack(of_ranks, dim=1).tolist(), strict=True):
        names_of[tuple(rank for rank, odd in zip(ranks, _unlike_most(column), strict=True) if odd)].append(name)
    return [
        f"{check.ranks} {ranks}: rank {' and '.join(map(str, odd))} in {_listed(names)}."
        for odd, names in names_of.items()
        if odd
    ]


def _unlike_most(values: list[int]) -> list[bool]:
    """All are, where no value is that of more than half."""
    value, count = Counter(values).most_common(1)[0]
    return [mine != value or 2 * count <= len(values) for mine in values]


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _raise(reports: list[str], step: int) -> None:
    of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, reports)
    raise DivergenceError(
        f"after step {step} ranks differ in what they must hold alike, bit for bit. "
        + " ".join(line for lines in of_ranks for line in lines),
        remedy="Continue from the last checkpoint by the same command. If the same rank differs again, suspect its "
        "hardware, and leave its node out",
        location=f"step {step}",
    )
