"""Small things that all ranks of a launch must know alike; every rank calls these together."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_bipe.parallel.mesh import Mesh

Thing = TypeVar("Thing")


def total(number: int, mesh: Mesh) -> int:
    """The sum over ranks."""
    if mesh.num_ranks == 1:
        return number
    numbers = torch.tensor(number, device=mesh.device)
    dist.all_reduce(numbers)
    return int(numbers)


def from_main(thing: Thing, mesh: Mesh) -> Thing:
    """What the main rank has; those of others are not looked at."""
    things: list[Any] = [thing]
    if mesh.num_ranks > 1:
        dist.broadcast_object_list(things, src=0, device=mesh.device)
    told: Thing = things[0]
    return told


def of_all(thing: Thing, mesh: Mesh) -> list[Thing]:
    """What each rank has, by rank."""
    things: list[Any] = [thing] * mesh.num_ranks
    if mesh.num_ranks > 1:
        dist.all_gather_object(things, thing)
    return things
