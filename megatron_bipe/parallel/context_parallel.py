"""Windows that are split over ranks: context parallelism, for windows whose activations do not fit on one rank.

Each rank has a run of the positions of a window, and does for them all that works token by token. Before attention
ranks exchange that for whole windows of some heads, and afterwards back: one all-to-all for queries, keys and values
together, one for the output. So attention is the same causal attention as on one rank, the ids that it encodes are
those of whole windows, and ranks have equal work.

B batch · T positions · G head groups · X more (lower case: this rank's share)
Source: Jacobs et al. 2023 (DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_bipe.parallel.collectives import own_tokens, to_heads, to_tokens


class UlyssesExchange:
    """All-to-all exchange over the ranks of a group: the `HeadExchange` of context parallelism (DeepSpeed-Ulysses)."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.rank, self.ranks = group.rank(), group.size()

    def own(self, ids_BT: Tensor) -> Tensor:
        """This rank's run of positions."""
        return own_tokens(ids_BT, self._group)

    def to_heads(self, x_BtGX: Tensor) -> Tensor:
        """[B, t, G, ...] -> [B, T, g, ...]."""
        return to_heads(x_BtGX, self._group)

    def to_tokens(self, x_BTgX: Tensor) -> Tensor:
        """[B, T, g, ...] -> [B, t, G, ...]."""
        return to_tokens(x_BTgX, self._group)
