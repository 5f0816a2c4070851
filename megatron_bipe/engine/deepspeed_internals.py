"""Access to private attributes of DeepSpeed's optimizers and of torch, which other modules of this package do not need.

Most of this module presents the training state of any DeepSpeed optimizer as a list of fragments. DeepSpeed's
optimizers store the fp32 weights, and with them Adam's state, in different tensors:

    fp32 without ZeRO                    the parameters themselves
    bf16 without ZeRO                    an fp32 copy of each parameter
    pipeline stages in bf16, ZeRO 1, 2   this rank's part of all fp32 copies: one flat tensor per parameter group
    ZeRO 3                               a part of every fp32 copy, concatenated in flat tensors

Such a tensor of fp32 weights is called a master here. Fragments are views of masters and of their Adam state, so
writing into them loads a checkpoint.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from megatron_bipe.checkpoint.shard_files import KINDS, WEIGHT, Fragment, StateReader
from megatron_bipe.model import copy_source, shard_of

_KNOWN_VERSIONS = {"torch": ("2.11", "2.12", "2.13"), "deepspeed": ("0.19",)}  # checked against their private APIs
_STEP = "step"  # key of the number of updates in torch's Adam state


_log = logging.getLogger(__name__)


def warn_of_unknown_versions() -> None:
    """Log a warning if the installed torch or DeepSpeed is not a version that this module was written for."""
    for name, version in (("torch", torch.__version__), ("deepspeed", deepspeed.__version__)):
        if version.rsplit(".", 1)[0] not in _KNOWN_VERSIONS[name]:
            known = ", ".join(_KNOWN_VERSIONS[name])
            _log.warning("%s %s was not tested with this code (known: %s)", name, version, known)


def skip_operator_probe() -> None:
    """Mark all of DeepSpeed's operators as not compiled, so that it does not probe them.

    On a CPU the probe would compile a shared-memory collective that only inference uses, for about a minute at the
    first start on each machine, and it would warn about every operator that cannot be compiled.
    """
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010  # reading the attribute would already probe


def set_group_timeouts(timeout: timedelta) -> None:
    """Set the timeout of all groups of this rank, including those that DeepSpeed has created.

    A new group has torch's default timeout, 10 or 30 minutes, whatever the timeout of the group of all ranks is.
    """
    for group in list(distributed_c10d._world.pg_map):
        if not distributed_c10d._rank_not_in_group(group):
            distributed_c10d._set_pg_timeout(timeout, group)


class _Location(NamedTuple):
    """A slice of a master and the slice of the parameter that it holds."""

    master: Tensor
    offset: int  # in the master
    start: int  # in the flattened parameter
    size: int


def fragments(module: nn.Module, optimizer: Any) -> list[Fragment]:
    """Return this rank's state in the order of its parameters; a copy has the name of the parameter that it copies.

    Args:
        module: the rank's part of the model, with the plan's parameter names.
        optimizer: DeepSpeed's optimizer, after `reset_adam_state` or `load_optimizer_state`.
    """
    adam = _torch_optimizer(optimizer)
    found = []
    for own_name, parameter in module.named_parameters():
        name = copy_source(parameter) or own_name
        for location in _locations(parameter, optimizer):
            state = {
                WEIGHT: location.master.detach(),
                **{kind: adam.state[location.master][kind] for kind in KINDS[1:]},
            }
            views = {kind: x.flatten().narrow(0, location.offset, location.size) for kind, x in state.items()}
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 leaves an empty parameter
            found.append(Fragment(name, shape, shard_of(parameter), location.start, views, is_copy=name != own_name))
    return found


def is_sharded(optimizer: Any) -> bool:
    """Return True if data-parallel ranks hold different fragments, False if they hold replicas."""
    return isinstance(optimizer, BF16_Optimizer | DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3)


def optimizer_steps(optimizer: Any) -> int:
    return int(next(iter(_torch_optimizer(optimizer).state.values()))[_STEP])


def reset_adam_state(optimizer: Any) -> None:
    """Reset Adam's state to zeros before the first update, since DeepSpeed may take a step during setup."""
    _torch_optimizer(optimizer).state.clear()
    _zero_moments(optimizer, 0)


@torch.no_grad()
def load_optimizer_state(
    module: nn.Module, optimizer: Any, reader: StateReader, in_rounds: Callable[[Iterable[object]], None]
) -> None:
    """Load this rank's fp32 weights and Adam state, and update the model's weights; all ranks call this together.

    `in_rounds` does the reading, which takes long and contains no collectives.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()
    _zero_moments(optimizer, reader.index.optimizer_steps)
    in_rounds(
        view.copy_(reader.run(kind, fragment))
        for fragment in fragments(module, optimizer)
        for kind, view in fragment.state.items()
    )
    _update_compute_weights(optimizer)


def _zero_moments(optimizer: Any, steps: int) -> None:
    adam = _torch_optimizer(optimizer)
    for master in _masters(optimizer):
        step = torch.tensor(float(steps), device=master.device)
        adam.state[master] = {_STEP: step} | {kind: torch.zeros_like(master) for kind in KINDS[1:]}


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _masters(optimizer: Any) -> list[Tensor]:
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):  # between steps its param_groups are empty
        return [master for master in optimizer.fp32_partitioned_groups_flat if master.numel()]
    return [master for group in _torch_optimizer(optimizer).param_groups for master in group["params"]]


def _locations(parameter: Tensor, optimizer: Any) -> Iterator[_Location]:
    """Yield the parameter's slice of the optimizer state, if this rank owns any of it."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        group, offset, capacity = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = capacity * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        size = min(capacity, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if size > 0:  # the last ranks may hold only padding
            yield _Location(optimizer.fp32_partitioned_groups_flat[group], offset, start, size)
    elif is_sharded(optimizer):
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            master = _masters(optimizer)[mapping.param_group_index]
            in_master, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield _Location(master, in_master.start, in_parameter.start, in_master.numel)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        yield _Location(dict(compute_weights_and_copies(optimizer))[parameter], 0, 0, parameter.numel())
    else:
        yield _Location(parameter, 0, 0, parameter.numel())


def compute_weights_and_copies(optimizer: FP16_UnfusedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each bf16 weight, and its fp32 copy."""
    for weights, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(weights, copies, strict=True)


def _update_compute_weights(optimizer: Any) -> None:
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for part, master in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            part.copy_(master)
        optimizer.checkpoint_event_epilogue()
    elif is_sharded(optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameter, copy in compute_weights_and_copies(optimizer):
            parameter.copy_(copy)
