"""Check that both forms of a trained tokenizer give equal ids on a text sample, before they are written."""

from collections.abc import Iterator

import sentencepiece
import tokenizers

from megatron_bipe.errors import DataError

SHARE = 0.01  # of the training text
LEAST_BYTES = 200_000  # so that a small training text is checked in full
MOST_BYTES = 4_000_000  # takes a few seconds
MOST_CHARS_A_TEXT = 100_000
HARD_TEXTS = (
    " leading",
    "   three  two trailing   ",
    "\n\n\tif x:\r\n\t\treturn  [ ]\r\n",
    "a .\nb . \u2581 . c",
    "e\u0301\u0302 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f680\U0001f1e9\U0001f1ea \u4e2d\u6587\u3000\u00a0x",
    "<s> <0x0A> </s>a<unk>",
    "a\x00b\ufeff1234567890",
)


class CheckSample:
    """Sample of a stream of texts, spread over all of it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def tapped(self, texts: Iterator[str]) -> Iterator[str]:
        """Yield the same texts, and keep some of them."""
        passed = kept = 0
        for text in texts:
            passed += len(text)
            if kept < min(max(LEAST_BYTES, SHARE * passed), MOST_BYTES):
                self.texts.append(text[:MOST_CHARS_A_TEXT])
                kept += len(self.texts[-1])
            yield text


def check_agreement(model: bytes, definition: bytes, texts: list[str]) -> None:
    """Raise `DataError` if tokenizer.model and tokenizer.json give different ids on `texts` or on `HARD_TEXTS`."""
    first = sentencepiece.SentencePieceProcessor(model_proto=model)
    second = tokenizers.Tokenizer.from_str(definition.decode())
    second.encode_special_tokens = True
    for text in (*HARD_TEXTS, *texts):
        ids, others = first.encode(text), second.encode(text, add_special_tokens=False).ids
        if ids != others:
            position = next((n for n, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), 0)
            around = first.decode(ids[max(position - 5, 0) : position + 5])
            raise DataError(
                f"tokenizer.model and tokenizer.json disagree on training text near {around!r}, token {position}; "
                "nothing was written",
                remedy="Use another --vocab-size or other text, and report this",
                location="tokenizer.json",
            )
