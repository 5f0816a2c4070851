"""Context parallelism (DeepSpeed-Ulysses), for sequences whose activations do not fit on one rank.

Each rank holds a contiguous slice of a sequence's positions and performs all token-wise work for them. Before attention
ranks exchange the slices for full sequences of some heads, and reverse this afterwards: one all-to-all for queries,
keys and values together, one for the output. Attention is therefore the same causal attention as on one rank, encodes
the ids of full sequences, and the load is equal on all ranks.

B batch · T positions · G head groups · X remaining dimensions (lower case: this rank's shard)
Source: Jacobs et al. 2023 (DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_bipe.parallel.collectives import own_tokens, to_heads, to_tokens


class UlyssesExchange:
    """The `HeadExchange` of context parallelism: an all-to-all over the ranks of a group."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.rank, self.ranks = group.rank(), group.size()

    def own(self, ids_BT: Tensor) -> Tensor:
        return own_tokens(ids_BT, self._group)

    def to_heads(self, x_BtGX: Tensor) -> Tensor:
        return to_heads(x_BtGX, self._group)

    def to_tokens(self, x_BTgX: Tensor) -> Tensor:
        return to_tokens(x_BTgX, self._group)
