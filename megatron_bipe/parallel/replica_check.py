"""Check that replicated tensors are bit-identical on all ranks, at little cost.

Ranks compare hashes of 16 bytes per tensor, whatever its size. A difference means that a rank computed or stored
something wrongly, which the losses would not show for a long time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_bipe.errors import DivergenceError
from megatron_bipe.parallel.collectives import all_gather_json

_CHUNK = 1 << 20  # elements at a time, which temporarily take 8 bytes each
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, with well-mixed bits: 2^64 over the golden ratio, as int64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 3  # largest number of tensors that a message names


class Replicas(NamedTuple):
    """Tensors that are replicated on all ranks of a group.

    Args:
        ranks: description of the group, for the message.
        group: the ranks.
        tensors: the same names in the same order on each of them.
    """

    ranks: str
    group: ProcessGroup
    tensors: Mapping[str, Tensor]


def check_replicas(checks: Sequence[Replicas], step: int) -> None:
    """Compare replicated tensors; all ranks of the launch call this together.

    Args:
        checks: this rank's replicated tensors; ranks of a group list their groups in the same order.
        step: updates done, for the message.

    Raises:
        DivergenceError: on all ranks, if any two replicas differ; it names the ranks that differ from the majority.
    """
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    hashes = [bits_hash(check.tensors.values()).to(device) for check in checks]
    differ = [_differ(hashes_N, check.group) for check, hashes_N in zip(checks, hashes, strict=True)]
    any_differ = torch.tensor(int(any(differ)), device=device)
    dist.all_reduce(any_differ, dist.ReduceOp.MAX)  # groups without a difference must raise with the others
    if any_differ:
        reports = [line for check, hashes_N in zip(checks, hashes, strict=True) for line in _report(check, hashes_N)]
        _raise(reports, step)


def bits_hash(tensors: Iterable[Tensor]) -> Tensor:
    """Return a 64-bit hash of each tensor, int64 [N], on the device of the first.

    The hash is the sum of the elements' bits, as integers, each times an odd number that depends on its index. A change
    of an element, of the sign of zero or of the order changes the hash; equal bits, including NaN, give equal hashes on
    any device.
    """
    hashes = [_bits_hash(tensor) for tensor in tensors]
    return torch.stack([value.to(hashes[0].device) for value in hashes])


def _bits_hash(tensor: Tensor) -> Tensor:
    bits = tensor.detach().flatten().view(_INTEGERS[tensor.element_size()])
    odd = torch.arange(min(_CHUNK, len(bits)), device=bits.device) * 2 + 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK]
        total = total * _FACTOR + (odd[: len(part)] * part).sum()  # modulo 2^64
    return total


def _differ(hashes_N: Tensor, group: ProcessGroup) -> bool:
    """Return True if the maximum over ranks differs from the minimum, which follows from the maximum of ~x = -1 - x."""
    extremes_2N = torch.cat([hashes_N, ~hashes_N])
    dist.all_reduce(extremes_2N, dist.ReduceOp.MAX, group=group)
    return not torch.equal(extremes_2N[: len(hashes_N)], ~extremes_2N[len(hashes_N) :])


def _report(check: Replicas, hashes_N: Tensor) -> list[str]:
    """Return, on the first rank of a group, one line per set of ranks that differ from the majority in some tensors."""
    ranks = dist.get_process_group_ranks(check.group)
    gathered = [torch.empty_like(hashes_N) for _ in ranks]
    dist.all_gather(gathered, hashes_N, group=check.group)
    if check.group.rank() != 0:
        return []
    names_by_ranks = defaultdict(list)
    for name, values in zip(check.tensors, torch.stack(gathered, dim=1).tolist(), strict=True):
        deviants = tuple(rank for rank, deviates in zip(ranks, _deviations(values), strict=True) if deviates)
        names_by_ranks[deviants].append(name)
    return [
        f"{check.ranks} {ranks}: rank {' and '.join(map(str, deviants))} in {_listed(names)}."
        for deviants, names in names_by_ranks.items()
        if deviants
    ]


def _deviations(values: list[int]) -> list[bool]:
    """Mark values that differ from the majority; all are marked if there is no majority."""
    value, count = Counter(values).most_common(1)[0]
    return [mine != value or 2 * count <= len(values) for mine in values]


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _raise(reports: list[str], step: int) -> None:
    raise DivergenceError(
        f"after step {step} ranks differ in tensors that must be bit-identical. "
        + " ".join(line for lines in all_gather_json(reports) for line in lines),
        remedy="Continue from the last checkpoint with the same command. If the same rank differs again, suspect its "
        "hardware and exclude its node",
        location=f"step {step}",
        transient=True,  # a restart discards the difference; a defective rank shows again, and the supervisor gives up
    )
