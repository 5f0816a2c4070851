"""Where DeepSpeed keeps the training state: each of its optimizers elsewhere, here one list of fragments.

    fp32, no ZeRO             torch's optimizer works on the parameters themselves
    bf16, no ZeRO             on an fp32 copy of each
    stages in bf16, ZeRO 1, 2 on this rank's part of all copies end to end, one flat tensor for each group of parameters
    ZeRO 3                    on a part of every copy, end to end in flat tensors

What torch's optimizer works on is called a master here. Fragments are views of masters and of their Adam state, so that
writing into them is loading.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron_bipe.checkpoint.shard_files import KINDS, WEIGHT, Fragment, StateReader
from megatron_bipe.model.layer_factory import shard_of
from megatron_bipe.model.transformer import copied

_STEP = "step"  # updates so far, as torch's Adam names them


class _Place(NamedTuple):
    """Which elements of a master are which of a parameter."""

    master: Tensor
    offset: int  # in the master
    start: int  # in the flattened parameter
    size: int


def fragments(module: nn.Module, optimizer: Any) -> list[Fragment]:
    """The state of this rank, in the order of the parameters; copies have the name of what they are copies of.

    Args:
        module: the rank's part of the model, under the plan's names.
        optimizer: what DeepSpeed made of torch's; `reset_adam_state` or `load_optimizer_state` has been called.
    """
    adam = _torch_optimizer(optimizer)
    found = []
    for own_name, parameter in module.named_parameters():
        name = copied(parameter) or own_name
        for location in _places(parameter, optimizer):
            state = {
                WEIGHT: location.master.detach(),
                **{kind: adam.state[location.master][kind] for kind in KINDS[1:]},
            }
            views = {kind: x.flatten().narrow(0, location.offset, location.size) for kind, x in state.items()}
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 leaves an empty tensor in place
            found.append(Fragment(name, shape, shard_of(parameter), location.start, views, is_copy=name != own_name))
    return found


def is_sharded(optimizer: Any) -> bool:
    """Whether each data-parallel rank has fragments of its own; otherwise all have the same."""
    return isinstance(optimizer, BF16_Optimizer | DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3)


def optimizer_steps(optimizer: Any) -> int:
    """Updates that Adam has counted."""
    return int(next(iter(_torch_optimizer(optimizer).state.values()))[_STEP])


def reset_adam_state(optimizer: Any) -> None:
    """Let Adam begin, whatever DeepSpeed made it do at the start: before the first update it has state already."""
    _torch_optimizer(optimizer).state.clear()
    _zero_moments(optimizer, 0)


@torch.no_grad()
def load_optimizer_state(module: nn.Module, optimizer: Any, reader: StateReader) -> None:
    """Set the state of this rank, and the weights that the model computes with; all ranks call this together."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()
    _zero_moments(optimizer, reader.index.optimizer_steps)
    for fragment in fragments(module, optimizer):
        for kind, view in fragment.state.items():
            view.copy_(reader.run(kind, fragment))
    _compute_weights_follow(optimizer)


def _zero_moments(optimizer: Any, steps: int) -> None:
    adam = _torch_optimizer(optimizer)
    for master in _masters(optimizer):
        step = torch.tensor(float(steps), device=master.device)
        adam.state[master] = {_STEP: step} | {kind: torch.zeros_like(master) for kind in KINDS[1:]}


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _masters(optimizer: Any) -> list[Tensor]:
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):  # it takes them out of the groups between steps
        return [master for master in optimizer.fp32_partitioned_groups_flat if master.numel()]
    return [master for group in _torch_optimizer(optimizer).param_groups for master in group["params"]]


def _places(parameter: Tensor, optimizer: Any) -> Iterator[_Place]:
    """At most one."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        group, offset, room = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = room * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        size = min(room, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if size > 0:  # the last ranks may hold padding alone
            yield _Place(optimizer.fp32_partitioned_groups_flat[group], offset, start, size)
    elif is_sharded(optimizer):
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            master = _masters(optimizer)[mapping.param_group_index]
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield _Place(master, here.start, there.start, here.numel)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        yield _Place(_copies(optimizer)[parameter], 0, 0, parameter.numel())
    else:
        yield _Place(parameter, 0, 0, parameter.numel())


def _copies(optimizer: FP16_UnfusedOptimizer) -> dict[Tensor, Tensor]:
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {parameter: copy for group in groups for parameter, copy in zip(*group, strict=True)}


def _compute_weights_follow(optimizer: Any) -> None:
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for part, master in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            part.copy_(master)
        optimizer.checkpoint_event_epilogue()
    elif is_sharded(optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameter, copy in _copies(optimizer).items():
            parameter.copy_(copy)
