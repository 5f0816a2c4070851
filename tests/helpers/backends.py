"""A tokenizer backend with an error."""

from collections.abc import Sequence

from megatron_bipe.data.tokenizer import Tokenizer
from preprocessing.document_tokenizer import Encoded, StockBackend


class Wrong:
    """Backend that returns wrong ids for one word."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stock = StockBackend(tokenizer)

    def encode(self, texts: Sequence[str]) -> Encoded:
        return self._stock.encode([text.replace("wrong", "right") for text in texts])
