"""The model card of an exported model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_bipe.config import ModelConfig
from megatron_bipe.hf.hf_config import DataFields, is_stock

_ABSOLUTE = {"none": "", "learned": "learned embedding", "sinusoidal": "sines and cosines"}
_RELATIVE = {"rope": "RoPE", "alibi": "ALiBi", "xpos": "XPOS", "t5": "T5's relative bias", "nope": ""}
_POSITIONS = {
    "segments": ("intra-segment positions", "segment numbers"),
    "tokens": ("token positions", "token positions"),
    "drawn": ("", "token positions sampled at random in training"),
}
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

| | |
|---|---|
{rows}
{perplexity}
Parity: on sample sequences, logits of this folder, loaded through transformers, differ from those of the training
model by at most {figure:.1e} of the largest logit (both in fp32, from the weights stored here).

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR"{code})
tokenizer = AutoTokenizer.from_pretrained("DIR")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
PLOT = "perplexity.png"
_PERPLEXITY = """
![Perplexity by sequence length]({plot})

{text}
"""
_SEGMENTS = """
A segment ends with a separator token, which belongs to it. Positions are derived from the input tokens:
`model.bilevel_ids(input_ids, attention_mask)` returns them. Batches may be padded on either side if the attention
mask marks the padding; generation supports the dynamic and the static cache.
"""
_SPECIAL_AS_TEXT = """
As in training, the tokenizer prepends BOS to a text and encodes the names of special tokens in a text as plain
characters; `split_special_tokens=False` changes that.
"""
_SPECIAL_AS_TOKENS = """
As in training, the tokenizer prepends BOS to a text, and the name of a special token in a text becomes that token;
`split_special_tokens=True` changes that.
"""


class PerplexityPlot(NamedTuple):
    """Evaluation results of the model."""

    png: bytes
    """Plot of perplexity against sequence length."""
    text: str
    """The same results as Markdown, with the data and the protocol."""


def model_card(
    title: str,
    config: ModelConfig,
    data: DataFields,
    figure: float,
    weights: Iterable[Tensor],
    has_tokenizer: bool,
    facts: Mapping[str, str],
    perplexity: PerplexityPlot | None = None,
) -> str:
    """Return README.md in Hugging Face's format; of `weights` only shapes and dtype are used."""
    shapes = list(weights)
    dtype = str(shapes[0].dtype).removeprefix("torch.")
    rows = {
        "Positional encoding": _describe_encoding(config),
        "Parameters": f"{sum(t.numel() for t in shapes):,} ({dtype})",
        "Layers / width / heads / feed-forward": f"{config.num_layers} / {config.hidden_size} / {config.num_heads}"
        f" ({config.kv_heads} key/value) / {config.ffn_size}",
        "Vocabulary": f"{config.vocab_size:,}",
        "Training length": f"{config.train_len_tokens:,} tokens",
        "Segment rule": f"`{data.segments_spec}`, separator ids {_ids(data.token_ids)}",
        "Tokenizer fingerprint": f"`{data.tokenizer_fingerprint}`" if data.tokenizer_fingerprint else "not known",
    } | dict(facts)
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    code = "" if is_stock(config) else ", trust_remote_code=True"
    measured = _PERPLEXITY.format(plot=PLOT, text=perplexity.text) if perplexity else ""
    special = (_SPECIAL_AS_TOKENS if data.special_in_text else _SPECIAL_AS_TEXT) if has_tokenizer else ""
    text = _HEAD.format(title=title, rows=table, figure=figure, code=code, perplexity=measured)
    return text + (_SEGMENTS if config.bilevel else "") + special


def _describe_encoding(config: ModelConfig) -> str:
    parts = config.parts
    position_ids, positions = _POSITIONS[parts.positions]
    named = (
        (_ABSOLUTE.get(parts.absolute, parts.absolute), position_ids),
        (_RELATIVE.get(parts.relative, parts.relative), positions),
    )
    text = ", ".join(f"{name} over {what}" for name, what in named if name) or "none"
    return f"`{config.encoding}`, bilevel (BiPE): {text}" if config.bilevel else f"`{config.encoding}`: {text}"


def _ids(token_ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, list(token_ids)[:12]))
    more = f", and {len(token_ids) - 12} more" if len(token_ids) > 12 else ""
    return (shown + more) or "none"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
