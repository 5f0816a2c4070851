"""Layer 0: tokens, and the absolute part of the encoding, become the residual stream; intra-segment ids stop here.

B batch · T positions · D width (lower case: this rank's share)
"""

from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.errors import ConfigError
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.make import make_absolute
from megatron_bipe.model.positions.position_ids import random_position_ids, spread_places, token_position_ids


class Embedding(nn.Module):
    """Token table, what the absolute part of the encoding adds, and the positions that attention encodes.

    Args:
        config: of the model.
        layers: what makes the tables.
        seed: of the run, for positions that are drawn.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory, seed: int = 0) -> None:
        super().__init__()
        self._config, self._own, self._seed = config, layers.windows.own, seed
        self.token = layers.table(config.vocab_size, config.hidden_size, -1 if config.zero_last_row else None)
        absolute = make_absolute(config, layers)
        self.intra = absolute if config.bilevel else None
        self.place = None if config.bilevel else absolute

    def forward(self, ids: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(tokens, intra ids, inter ids), each int64 [B, T] -> (hidden [B, t, D], positions int64 [B, T]).

        The positions are what attention encodes: inter-segment ids, or the token's place in the window. They are
        those of whole windows, since attention sees these.

        Raises:
            ConfigError: the windows are longer than the encoding allows.
        """
        tokens_BT, intra_BT, inter_BT = ids
        self._check_length(tokens_BT.shape[1])
        hidden_BtD = self.token(self._own(tokens_BT))
        if self._config.bilevel:
            return _sum(hidden_BtD, self.intra, self._own(intra_BT)), inter_BT
        places_BT = self._places(tokens_BT)
        return _sum(hidden_BtD, self.place, self._own(places_BT)), places_BT

    def _check_length(self, num_tokens: int) -> None:
        config, longest = self._config, self._config.longest_window_tokens
        if longest is not None and num_tokens > longest:
            raise ConfigError(
                f"a window of {num_tokens} tokens exceeds the {longest} that model.encoding={config.encoding} encodes",
                remedy="Use a shorter window",
                location="train.seq_len_tokens or --lengths",
            )

    def _places(self, tokens_BT: Tensor) -> Tensor:
        config = self._config
        if config.parts.positions == "tokens":
            return token_position_ids(tokens_BT)
        if self.training:
            return random_position_ids(tokens_BT, config.drawn_range, self._seed)
        return spread_places(tokens_BT, config.drawn_range, config.train_len_tokens)


def _sum(hidden_BtD: Tensor, absolute: nn.Module | None, places_Bt: Tensor) -> Tensor:
    return hidden_BtD if absolute is None else hidden_BtD + absolute(places_Bt).to(hidden_BtD.dtype)
