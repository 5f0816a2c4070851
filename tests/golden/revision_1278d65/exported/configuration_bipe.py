"""Configuration of an exported BiPE model; travels with the weights as remote code.

Keys that LLaMA has keep LLaMA's names. `rope_parameters` is transformers 5's own form: `rope_theta`,
`rope_type` (default, linear, dynamic or yarn) and what the scaled types need besides.
"""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

ABSOLUTE = ("none", "learned", "sinusoidal")  # added to the embeddings
RELATIVE = ("rope", "alibi", "xpos", "t5", "nope")  # in every attention layer
ROPE_TYPES = ("default", "linear", "dynamic", "yarn")
NUM_BUCKETS = 32  # rows of T5's table in every layer

# Absolute part, relative part, and what they go by: segments, tokens, or tokens whose positions training draws.
ENCODINGS = (
    {f"bipe_{name}": ("learned", name, "segments") for name in RELATIVE}
    | {name: ("none", name, "tokens") for name in RELATIVE}
    | {name: (name, "nope", "tokens") for name in ABSOLUTE[1:]}
    | {"randomized_rope": ("none", "rope", "drawn")}
)


class BipeConfig(PreTrainedConfig):
    """Shape, positional encoding, segment rule and tokenizer of one model."""

    model_type = "bipe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # Programs that ask for the longest input get the training length; the encodings themselves have no limit.
    attribute_map: ClassVar[dict[str, str]] = {"max_position_embeddings": "train_len_tokens"}

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 0  # 0: as many as query heads
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_parameters: dict[str, Any] | None = None
    encoding: str = "bipe_rope"
    intra_encoding: str = "learned"  # absolute part of the bilevel encodings, by the place in the segment
    intra_size: int = 1024  # rows of the intra-segment table; longer segments are clipped to the last row
    train_len_tokens: int = 1024  # reference point of log_scale and RoPE scaling; rows of `learned`
    position_range: int | None = None  # randomized_rope: below this positions are drawn; None: 4 x train_len_tokens
    log_scale: bool = False  # queries times ln(position + 1) / ln(train_len_tokens)
    zero_last_row: bool = False  # the last row of both tables is zero and untrained, as in the published models
    segments: dict[str, Any] | None = None  # {"spec": name of the rule, "token_ids": its separators}
    tokenizer_fingerprint: str | None = None  # sha256 of the tokenizer that made the training data
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Defaults that depend on other fields, then what transformers does."""
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError where the fields contradict each other; the model calls it when it is built."""
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding {self.encoding!r} is none of {', '.join(ENCODINGS)}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % kv_heads:
            raise ValueError(f"hidden_size {self.hidden_size}, {heads} {kv_heads} key/value heads do not divide")
        if self.intra_encoding not in ABSOLUTE:
            raise ValueError(f"intra_encoding {self.intra_encoding!r} is none of {', '.join(ABSOLUTE)}")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type {rope_type!r} is not implemented; known: {', '.join(ROPE_TYPES)}")
        if self.bilevel and not isinstance((self.segments or {}).get("spec"), str):
            raise ValueError(f"encoding {self.encoding!r} needs the segment rule of the training data in `segments`")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def bilevel(self) -> bool:
        """True where positions come from segments."""
        return self.positions == "segments"

    @property
    def positions(self) -> str:
        """What the encoding goes by: segments, tokens or drawn."""
        return ENCODINGS[self.encoding][2]

    @property
    def absolute(self) -> str:
        """What is added to the embeddings."""
        return self.intra_encoding if self.bilevel else ENCODINGS[self.encoding][0]

    @property
    def relative(self) -> str:
        """What attention does."""
        return ENCODINGS[self.encoding][1]

    @property
    def drawn_range(self) -> int:
        """`position_range` after the default is applied."""
        return self.position_range or 4 * self.train_len_tokens

    @property
    def segment_length(self) -> int | None:
        """N of the segment rule `fixed:N`; None for rules made of separator tokens."""
        name, _, length = str((self.segments or {}).get("spec")).partition(":")
        return int(length) if name == "fixed" else None

# Version of this remote code: 3c74701ac0bf1ffd
