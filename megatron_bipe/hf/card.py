"""The model card of an exported model."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from huggingface_hub import ModelCardData
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
{metadata}
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

name = {name}  # path of this folder, or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(name{code})
tokenizer = AutoTokenizer.from_pretrained(name{code})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
_VERSION = """
The code in this folder needs transformers 5 or later. Version 4 cannot load it.
"""
_STOCK_VERSION = """
This is a stock LLaMA model, which transformers 4.57 and later can load.
"""
_RECIPE = """
## Training recipe

| setting | value |
|---|---|
{rows}
"""
_CITATION = """
## Citation

```bibtex
@inproceedings{he2024bipe,
  title     = {Two Stones Hit One Bird: Bilevel Positional Encoding for Better Length Extrapolation},
  author    = {He, Zhenyu and Feng, Guhao and Luo, Shengjie and Yang, Kai and Wang, Liwei and Xu, Jingjing and
               Zhang, Zhi and Yang, Hongxia and He, Di},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2401.16421}
}
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


class CardFacts(NamedTuple):
    """What a model card says beyond the model itself."""

    title: str = "BiPE language model"
    """Name of the folder."""
    rows: Mapping[str, str] = {}
    """Rows of the first table: step, data, losses, ..."""
    recipe: Mapping[str, str] = {}
    """Values of the settings of training by name."""
    languages: Sequence[str] = ()
    """ISO 639-1 codes; empty if not known."""
    datasets: Sequence[str] = ()
    """Names of the training data on the Hub."""
    perplexity: PerplexityPlot | None = None
    """Evaluation results."""


def model_card(
    facts: CardFacts, config: ModelConfig, data: DataFields, figure: float, weights: Iterable[Tensor]
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
    } | dict(facts.rows)
    code = "" if is_stock(config) else ", trust_remote_code=True"
    measured = _PERPLEXITY.format(plot=PLOT, text=facts.perplexity.text) if facts.perplexity else ""
    text = _HEAD.format(
        metadata=_metadata(facts, config),
        title=facts.title,
        name=json.dumps(facts.title, ensure_ascii=False),
        rows=_table(rows),
        figure=figure,
        code=code,
        perplexity=measured,
    )
    text += _STOCK_VERSION if is_stock(config) else _VERSION
    text += _SEGMENTS if config.bilevel else ""
    if data.tokenizer_fingerprint is not None:
        text += _SPECIAL_AS_TOKENS if data.special_in_text else _SPECIAL_AS_TEXT
    text += _RECIPE.format(rows=_table(facts.recipe)) if facts.recipe else ""
    return text + (_CITATION if config.bilevel else "")


def _metadata(facts: CardFacts, config: ModelConfig) -> str:
    """Return the YAML at the head of the card, which the Hub reads."""
    metadata = ModelCardData(
        language=list(facts.languages) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*(["bipe"] if config.bilevel else []), config.encoding.replace("_", "-"), "causal-lm"],
        datasets=list(facts.datasets) or None,
    )
    return metadata.to_yaml()


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())


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
