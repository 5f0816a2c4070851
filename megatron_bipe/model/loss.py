"""Cross-entropy without a second copy of the logits, whose gradient overwrites them in place.

There are two passes over the logits: `sum_rows` for the loss, `gradients_in_place` for the gradient. Eager code
processes a part of the rows at a time, in fp32. Compiled, each pass is one kernel without an intermediate tensor: in
bf16, the first reads 2 bytes of each logit, the second reads and writes 2.

`token_losses` takes full rows of logits; `parallel.tensor_parallel` uses the same two passes for rows that are sharded
over ranks.

K tokens · V vocabulary (lower case: this rank's shard)
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_bipe.model.fused import compile_fused

NUM_PARTS = 16  # equal parts of a sequence, by which losses are summed in validation and evaluation

# fp32 elements processed at a time: few enough for a core's cache, enough to fill a GPU.
_PART_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def token_losses(logits_BTV: Tensor, labels_BT: Tensor, *, compiles: bool = False) -> Tensor:
    """Return the cross-entropy in nats of every token, fp32 [B, T]; evaluation aggregates it by its own protocol.

    Backward overwrites the logits with their gradient. `compiles` selects the compiled passes.
    """
    logits_KV, passes = logits_BTV.flatten(0, -2), loss_passes(compiles)
    losses_K: Tensor = _TokenLosses.apply(logits_KV, labels_BT.flatten(), passes)  # type: ignore[no-untyped-call]
    return losses_K.view_as(labels_BT)


class RowSums(NamedTuple):
    """Per-row statistics from which loss and gradient follow, fp32 [K] each."""

    highest_K: Tensor
    exps_K: Tensor  # sum of exp(logit - highest)
    labels_K: Tensor  # the label's logit - highest; 0 if the label is not among these columns

    def losses(self) -> Tensor:
        return self.exps_K.log() - self.labels_K


class LossPasses(NamedTuple):
    """The two passes over logits, as eager or as compiled code."""

    sum_rows: Callable[..., RowSums]  # the arguments of the function of this name
    gradients_in_place: Callable[[Tensor, Tensor, RowSums, Tensor], Tensor]


def sum_rows(logits_Kv: Tensor, columns_K: Tensor, highest_K: Tensor | None = None) -> RowSums:
    """Compute the sums over this rank's logits.

    Args:
        logits_Kv: logits in any precision; the sums are fp32.
        columns_K: column of each label; out of range if the label is on another rank.
        highest_K: approximate maximum of each full row, or more, fp32; None if these are full rows.
    """
    highest_K = highest_logits(logits_Kv) if highest_K is None else highest_K
    exps, labels = [], []
    for part_Kv, columns, highest in _parts(logits_Kv, columns_K, highest_K):
        scores_Kv = part_Kv.float() - highest[:, None]
        here = (columns >= 0) & (columns < scores_Kv.shape[1])
        labels.append(scores_Kv.gather(1, columns.where(here, 0)[:, None])[:, 0].where(here, 0))
        exps.append(scores_Kv.exp_().sum(dim=1))
    return RowSums(highest_K, torch.cat(exps), torch.cat(labels))


def highest_logits(logits_Kv: Tensor) -> Tensor:
    """Return the maximum of each row, fp32 [K]."""
    return logits_Kv.amax(dim=-1).float()


def gradients_in_place(logits_Kv: Tensor, columns_K: Tensor, sums: RowSums, grad_K: Tensor) -> Tensor:
    """Overwrite the logits with their gradient, (softmax - one-hot label) * `grad_K` for each row, and return them."""
    for part_Kv, columns, highest, exps, grad in _parts(logits_Kv, columns_K, sums.highest_K, sums.exps_K, grad_K):
        grad_Kv = (part_Kv.float() - highest[:, None]).exp_().mul_((grad / exps)[:, None])
        here = (columns >= 0) & (columns < grad_Kv.shape[1])
        grad_Kv.scatter_add_(1, columns.where(here, 0)[:, None], -(grad * here)[:, None])
        part_Kv.copy_(grad_Kv)
    return logits_Kv


@functools.cache
def loss_passes(compiles: bool) -> LossPasses:
    """Return the two passes, as code that all models of this process share."""
    if not compiles:
        return LossPasses(sum_rows, gradients_in_place)
    return LossPasses(compile_fused(_sum_rows_at_once), compile_fused(_gradients_at_once))


def _sum_rows_at_once(logits_Kv: Tensor, columns_K: Tensor, highest_K: Tensor | None = None) -> RowSums:
    """Compute `sum_rows` in a form that fuses: a gather would be another kernel."""
    highest_K = highest_logits(logits_Kv) if highest_K is None else highest_K
    scores_Kv = logits_Kv.float() - highest_K[:, None]
    labels_K = scores_Kv.where(_is_label(logits_Kv, columns_K), 0).sum(dim=1)
    return RowSums(highest_K, scores_Kv.exp().sum(dim=1), labels_K)


def _gradients_at_once(logits_Kv: Tensor, columns_K: Tensor, sums: RowSums, grad_K: Tensor) -> Tensor:
    """Compute `gradients_in_place` in a form that fuses."""
    scores_Kv = logits_Kv.float() - sums.highest_K[:, None]
    label_grad_Kv = grad_K[:, None].where(_is_label(logits_Kv, columns_K), 0)
    return logits_Kv.copy_(scores_Kv.exp() * (grad_K / sums.exps_K)[:, None] - label_grad_Kv)


def _is_label(logits_Kv: Tensor, columns_K: Tensor) -> Tensor:
    return torch.arange(logits_Kv.shape[1], device=logits_Kv.device) == columns_K[:, None]


def _parts(logits_Kv: Tensor, *vectors_K: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield contiguous slices of rows that are small enough to be processed at a time."""
    rows = max(1, _PART_ELEMENTS.get(logits_Kv.device.type, 2**20) // logits_Kv.shape[1])
    return zip(logits_Kv.split(rows), *(vector.split(rows) for vector in vectors_K), strict=True)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor, labels_K: Tensor, passes: LossPasses) -> Tensor:
        logits_KV = logits_KV.detach()  # compiled code is then the same whether or not a gradient is needed
        sums = passes.sum_rows(logits_KV, labels_K)
        ctx.save_for_backward(logits_KV, labels_K, *sums)
        ctx.gradients_in_place = passes.gradients_in_place
        return sums.losses()

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None, None]:
        logits_KV, labels_K, *sums = ctx.saved_tensors
        return ctx.gradients_in_place(logits_KV, labels_K, RowSums(*sums), grad_K), None, None
