"""Configuration of an exported BiPE model, distributed with the weights as remote code.

Keys that LLaMA has keep LLaMA's names. `rope_parameters` has the form of transformers 5: `rope_theta`, `rope_type`
(default, linear, dynamic or yarn) and the parameters of the scaled types.
"""

import inspect
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

ABSOLUTE = ("none", "learned", "sinusoidal")  # added to the token embeddings
RELATIVE = ("rope", "alibi", "xpos", "t5", "nope")  # applied in every attention layer
ROPE_TYPES = ("default", "linear", "dynamic", "yarn")

# Absolute part, relative part, and source of the position ids: segments, tokens, or positions drawn in training.
ENCODINGS = (
    {f"bipe_{name}": ("learned", name, "segments") for name in RELATIVE}
    | {name: ("none", name, "tokens") for name in RELATIVE}
    | {name: (name, "nope", "tokens") for name in ABSOLUTE[1:]}
    | {"randomized_rope": ("none", "rope", "drawn")}
)


class BipeConfig(PreTrainedConfig):
    """Shape, positional encoding, segment rule and tokenizer of a model."""

    model_type = "bipe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # Other programs read the longest input from here; the encodings themselves are not limited to it.
    attribute_map: ClassVar[dict[str, str]] = {"max_position_embeddings": "train_len_tokens"}

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 0  # 0: equal to the query heads
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_parameters: dict[str, Any] | None = None
    encoding: str = "bipe_rope"
    intra_encoding: str = "learned"  # absolute part of the bilevel encodings, over intra ids
    intra_size: int = 1024  # rows of the intra-segment embedding; larger intra ids are clipped to the last row
    train_len_tokens: int = 1024  # reference length of log_scale and RoPE scaling; rows of `learned`
    position_range: int | None = None  # randomized_rope: exclusive limit of drawn positions; None: 4 x train_len_tokens
    log_scale: bool = False  # multiply queries by ln(position + 1) / ln(train_len_tokens)
    zero_last_row: bool = False  # last row of both embeddings is zero and untrained, as published
    segments: dict[str, Any] | None = None  # {"spec": name of the rule, "token_ids": its separators}
    tokenizer_fingerprint: str | None = None  # sha256 of the training data's tokenizer
    special_in_text: bool | None = None  # names of special tokens in the training text became them; None: not recorded
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the code files that `auto_map` names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        from .functional_bipe import rotate  # another file only where the formulas come from a package

        functional = inspect.getsourcefile(rotate)
        for file in Path(__file__).parent.glob("*_bipe.py"):
            source = functional if file.name == "functional_bipe.py" and functional else file
            shutil.copyfile(source, Path(save_directory) / file.name)

    def validate_architecture(self) -> None:
        """Raise ValueError if the fields contradict each other; the model calls it when it is built."""
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding {self.encoding!r} is not one of {', '.join(ENCODINGS)}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, {heads} heads, {kv_heads} key/value heads: not divisible"
            )
        if self.intra_encoding not in ABSOLUTE:
            raise ValueError(f"intra_encoding {self.intra_encoding!r} is not one of {', '.join(ABSOLUTE)}")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type {rope_type!r} is not implemented; known: {', '.join(ROPE_TYPES)}")
        if self.bilevel and not isinstance((self.segments or {}).get("spec"), str):
            raise ValueError(f"encoding {self.encoding!r} requires the segment rule of the training data in `segments`")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def bilevel(self) -> bool:
        return self.positions == "segments"

    @property
    def positions(self) -> str:
        """Source of the position ids: segments, tokens or drawn."""
        return ENCODINGS[self.encoding][2]

    @property
    def absolute(self) -> str:
        """Encoding that is added to the embeddings."""
        return self.intra_encoding if self.bilevel else ENCODINGS[self.encoding][0]

    @property
    def relative(self) -> str:
        """Encoding that attention applies."""
        return ENCODINGS[self.encoding][1]

    @property
    def drawn_range(self) -> int:
        """`position_range` with its default applied."""
        return self.position_range or 4 * self.train_len_tokens

    @property
    def segment_length(self) -> int | None:
        """N of the segment rule `fixed:N`; None for rules based on separator tokens."""
        name, _, length = str((self.segments or {}).get("spec")).partition(":")
        return int(length) if name == "fixed" else None
