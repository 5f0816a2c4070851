"""The network's section of the run configuration, and the base class of all sections."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from megatron_bipe.config.encodings import (
    ABSOLUTE,
    ENCODINGS,
    RELATIVE,
    Encoding,
    Relative,
    known_absolute,
    known_encoding,
)

Positive = Annotated[int, Field(gt=0)]


def _choices(names: Iterable[str]) -> Any:
    """List the values that a validator accepts in the JSON schema, from which docs/configuration.md is generated."""
    return Field(json_schema_extra={"enum": list(names)})


class Section(BaseModel):
    """Base class of all sections: unknown keys are refused, and docstrings describe the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for other fields than switches; pydantic would read them as the numbers 1 and 0.

        A field with the choices `on` and `off`, which YAML reads as true and false, gets them back.
        """
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and "on" in get_args(annotation):
            return "on" if value else "off"
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("YAML reads yes, no, on, off, true and false as switches, and this field is not one")
        return value


class RopeScaling(Section):
    """Scaling of rotary positions beyond the training length."""

    type: Literal["linear", "dynamic", "ntk", "yarn"]
    """linear: divide positions by `factor`; dynamic: raise the base once the sequence exceeds `original_positions`;
    ntk: raise the base always; yarn: slow channel pairs as in linear, fast ones unchanged, sharper attention scores."""
    factor: Annotated[float, Field(gt=1.0)]
    """Target sequence length as a multiple of the training length. Required: it depends on the intended use."""
    original_positions: Positive | None = None
    """yarn: number of positions in a training sequence. Bilevel encodings count segments: the sequence length divided
    by the mean segment length. dynamic: longest sequence, in tokens, that keeps the base. Null: `train_len_tokens`."""
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    """yarn: channel pairs with more rotations than this over the original positions are unchanged. The default is the
    value of YaRN's authors for LLaMA."""
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    """yarn: channel pairs with fewer rotations than this are scaled by the full factor. The default is the value of
    YaRN's authors for LLaMA."""
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    """yarn: multiplier of queries and keys; null: 0.1 ln(factor) + 1, which its authors found best."""

    def unused(self) -> list[str]:
        """Return the fields without meaning for `type` that differ from their defaults."""
        yarn_only = ("beta_fast", "beta_slow", "attention_factor")
        keys = {"yarn": (), "dynamic": yarn_only}.get(self.type, ("original_positions", *yarn_only))
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]


class ModelConfig(Section):
    """Architecture of the network: everything that an exported model stores about itself."""

    encoding: Annotated[str, AfterValidator(known_encoding), _choices(ENCODINGS)] = "bipe_rope"
    """Positional encoding, see docs/encodings.md; `bipe_X` adds positions in segments to the embeddings, and
    attention encodes segment indices with X."""
    intra_encoding: Annotated[str, AfterValidator(known_absolute), _choices(ABSOLUTE)] = "learned"
    """Absolute part of a bilevel encoding, by the position in the segment; learned: as in the paper."""
    num_layers: Positive = 12
    """Number of transformer blocks; the default is that of the 151M model."""
    hidden_size: Positive = 768
    """Width of the residual stream, in channels; the default is that of the 151M model."""
    num_heads: Positive = 12
    """Number of query heads; the head width is hidden_size / num_heads, 64 by default."""
    num_kv_heads: Positive | None = None
    """Number of key/value heads in grouped-query attention; null: as many as query heads, as in the
    published models."""
    ffn_size: Positive = 3072
    """Inner width of the SwiGLU feed-forward layer, in channels; the default is that of the 151M model."""
    vocab_size: Positive = 32000
    """Rows of the token embedding: at least the tokenizer's number of ids. The default is that of LLaMA's tokenizer,
    which the published models use."""
    intra_size: Positive = 1024
    """Rows of the intra-segment embedding (bipe encodings with a learned absolute part); positions beyond the last row
    use the last row. The default covers a segment as long as the training sequence."""
    position_range: Positive | None = None
    """randomized_rope: upper bound of the positions that are drawn; null: 4 x train_len_tokens, the range tested in the
    paper."""
    train_len_tokens: Positive = 1024
    """Sequence length of pretraining, in tokens. It is the reference length of log_scale and rope_scaling, and the
    number of rows of the `learned` embedding. Keep it when a model is trained further with longer sequences."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Term that RMSNorm adds to the mean square, so that it never divides by zero."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal initialization of all matrices, as in LLaMA's implementation in transformers."""
    rope_base: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary frequencies; the default is that of the RoPE paper."""
    rope_scaling: RopeScaling | None = None
    """Scaling of rotary positions beyond the training length; null: none, as for training from scratch."""
    log_scale: bool = False
    """Multiply queries by ln(position + 1) / ln(train_len_tokens), which sharpens attention in long sequences; false:
    queries are not scaled."""
    zero_last_row: bool = False
    """Keep the last row of the token and the position embedding at zero and untrained. Only reproducing the published
    models needs this: their code does it by accident."""
    tied_output: bool = False
    """Use the token embedding as the output projection; false: a separate matrix, as in
    the published models."""

    @property
    def parts(self) -> Encoding:
        """Parts that `encoding` and `intra_encoding` name."""
        parts = ENCODINGS[self.encoding]
        return parts._replace(absolute=self.intra_encoding) if parts.positions == "segments" else parts

    @property
    def relative(self) -> Relative:
        return RELATIVE[self.parts.relative]

    @property
    def bilevel(self) -> bool:
        """True if the model receives segment positions."""
        return self.parts.positions == "segments"

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the learned position embedding; None if there is none."""
        if self.parts.absolute != "learned":
            return None
        return self.intra_size if self.bilevel else self.train_len_tokens

    @property
    def drawn_range(self) -> int:
        """`position_range` with its default applied."""
        return self.position_range or 4 * self.train_len_tokens

    @property
    def intra_clip(self) -> int:
        """Largest distinct position in a segment: the last row of a learned embedding; sinusoids have no limit."""
        return self.embedding_rows - 1 if self.bilevel and self.embedding_rows is not None else 2**31 - 1

    @property
    def num_positions(self) -> int | None:
        """Number of positions that the encoding has; None if it is unlimited or counts segments."""
        if self.parts.positions == "drawn":
            return self.drawn_range
        return None if self.bilevel else self.embedding_rows

    @property
    def max_seq_len_tokens(self) -> int | None:
        """Longest sequence that can be encoded; None: no limit."""
        limits = [limit for limit in (self.num_positions, self.relative.max_seq_len_tokens) if limit is not None]
        return min(limits, default=None)

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads` with its default applied."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads
