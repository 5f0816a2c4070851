"""The typed run configuration: every field once, with its unit and the reason for its default.

Defaults are the 151M BiPE-RoPE recipe of the paper. Rules that involve one field are types here;
rules that involve several are in `validate.py`; where values come from is in `load.py`.
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from megatron_bipe.config.encodings import ENCODINGS, RELATIVE, Encoding, Relative, known_absolute, known_encoding

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
ComputePrecision = Literal["bf16", "fp32"]
Precision = Literal["auto", "bf16", "fp32"]
AUTO: Literal["auto"] = "auto"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# Fields that a resumed run may change where `--allow` names them: the training state keeps its meaning, and the loss
# takes another course. Other changes would give weights another meaning, or read some windows twice and others never.
ALLOWABLE = ("optimizer", "train.precision", "data")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RopeScaling(_Section):
    """Stretching of the rotary positions beyond the training length."""

    type: Literal["linear", "dynamic", "ntk", "yarn"]
    """linear: positions divided by `factor`; dynamic: base raised once the window exceeds `train_len_tokens`; ntk: base
    raised once and for all; yarn: slow pairs of channels as linear, fast ones as they are, scores sharpened."""
    factor: Annotated[float, Field(gt=1.0)]
    """How many times the training length is wanted."""
    original_positions: Positive | None = None
    """yarn: positions of a window that the model was trained on; null: `train_len_tokens`. The bilevel encodings count
    segments: a window's tokens over the mean length of a segment."""
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    """yarn: pairs that turn more often than this over the original positions stay as they are."""
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    """yarn: pairs that turn less often than this are stretched by the whole factor."""
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    """yarn: what queries and keys are multiplied with; null: 0.1 ln(factor) + 1, as its authors found best."""

    def yarn_only(self) -> list[str]:
        """Fields that are for yarn alone and are not at their defaults."""
        keys = ("original_positions", "beta_fast", "beta_slow", "attention_factor")
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]


class ModelConfig(_Section):
    """Shape and encoding of the network; everything that an exported model needs to know of itself."""

    encoding: Annotated[str, AfterValidator(known_encoding)] = "bipe_rope"
    """Positional encoding, see docs/encodings.md; `bipe_X` adds places in segments to the embeddings and feeds segment
    counts to X in attention."""
    intra_encoding: Annotated[str, AfterValidator(known_absolute)] = "learned"
    """What a bilevel encoding adds to the embeddings, by the token's place in its segment; learned: the paper's."""
    num_layers: Positive = 12
    """Transformer blocks."""
    hidden_size: Positive = 768
    """Width of the residual stream."""
    num_heads: Positive = 12
    """Query heads; head width is hidden_size / num_heads."""
    num_kv_heads: Positive | None = None
    """Key/value heads of grouped-query attention; null: as many as query heads."""
    ffn_size: Positive = 3072
    """Inner width of the SwiGLU layer."""
    vocab_size: Positive = 32000
    """Rows of the token table: at least the tokenizer's number of ids (LLaMA: 32,000)."""
    intra_size: Positive = 1024
    """Rows of the intra-segment table (bipe encodings); longer segments are clipped to the last row."""
    position_range: Positive | None = None
    """randomized_rope: positions are drawn below this; null: 4 x train_len_tokens, up to where the paper's held."""
    train_len_tokens: Positive = 1024
    """Window length the model is trained at: reference point of log_scale and of RoPE scaling,
    rows of the table of `learned`."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in RMSNorm."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal initialisation of all matrices."""
    rope_base: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Null for training from scratch."""
    log_scale: bool = False
    """Multiply queries by ln(position + 1) / ln(train_len_tokens)."""
    zero_last_row: bool = False
    """Keep the last row of both embedding tables at zero and untrained, as the published models do by accident."""
    tied_output: bool = False
    """Project to the vocabulary with the token table, in place of a matrix of its own."""

    @property
    def parts(self) -> Encoding:
        """What `encoding` and `intra_encoding` stand for."""
        parts = ENCODINGS[self.encoding]
        return parts._replace(absolute=self.intra_encoding) if parts.positions == "segments" else parts

    @property
    def relative(self) -> Relative:
        """What is known of the relative part."""
        return RELATIVE[self.parts.relative]

    @property
    def bilevel(self) -> bool:
        """True where the model takes segment positions."""
        return self.parts.positions == "segments"

    @property
    def table_rows(self) -> int | None:
        """Rows of the learned table of places; None where there is none."""
        if self.parts.absolute != "learned":
            return None
        return self.intra_size if self.bilevel else self.train_len_tokens

    @property
    def drawn_range(self) -> int:
        """`position_range` after the default is applied."""
        return self.position_range or 4 * self.train_len_tokens

    @property
    def intra_clip(self) -> int:
        """Largest place in a segment that is told apart: the last row of a learned table; sines have no last place."""
        return self.table_rows - 1 if self.bilevel and self.table_rows is not None else 2**31 - 1

    @property
    def num_positions(self) -> int | None:
        """Places in the window that the encoding has; None where it has them all, or counts segments."""
        if self.parts.positions == "drawn":
            return self.drawn_range
        return None if self.bilevel else self.table_rows

    @property
    def max_seq_len_tokens(self) -> int | None:
        """Tokens beyond which windows cannot be encoded; None: no such limit."""
        limits = [limit for limit in (self.num_positions, self.relative.max_seq_len_tokens) if limit is not None]
        return min(limits, default=None)

    @property
    def kv_heads(self) -> int:
        """Key/value heads after the default is applied."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads


def _form_of(path: object) -> str | None:
    """Which of the forms of `DataPath` a value has, so that errors are about that one alone."""
    forms = {str: "folder", Path: "folder", list: "folders", tuple: "folders", dict: "weights"}
    return next((form for kind, form in forms.items() if isinstance(path, kind)), None)


Weight = Annotated[float, Field(gt=0)]
Folder = Annotated[str, Field(min_length=1)]
DataPath = Annotated[
    Annotated[Path, Tag("folder")]
    | Annotated[tuple[Folder, ...], Field(min_length=1), Tag("folders")]
    | Annotated[dict[Folder, Weight], Field(min_length=1), Tag("weights")],
    Discriminator(
        _form_of,
        custom_error_type="data_path",
        custom_error_message="Input should be a dataset folder, a list of folders, or a mapping of folders to weights",
    ),
]


class DataConfig(_Section):
    """What is read, and how it is cut into windows."""

    path: DataPath = Path("data/pile")
    """Dataset folder made by tools/preprocess.py, or by tools/prepare_task.py. Several are a blend: `{FOLDER: WEIGHT,
    ...}` takes them in the ratio of their weights, `[FOLDER, ...]` in that of their tokens."""
    valid_path: Path | None = None
    """Dataset folder for the validation loss; null: none is computed."""
    segments: str | None = None
    """Name of the segment rule the dataset must have been made with; null: whatever it has."""
    verify: bool = True
    """Compare shards with their checksums, beside training, as they are first read, and look every minute whether they
    are still the same files; the ranks share them out."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Dataset folders of the training data, in the order they are named."""
        return (self.path,) if isinstance(self.path, Path) else tuple(map(Path, self.path))

    @property
    def weights(self) -> tuple[float, ...] | None:
        """How often each folder's windows are taken, in any unit; None: in proportion to its tokens."""
        return tuple(self.path.values()) if isinstance(self.path, dict) else None


class OptimizerConfig(_Section):
    """AdamW; the published recipe's values."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegative = 10_000
    """Steps of linear increase from 0 to lr."""
    decay: Literal["polynomial", "cosine", "constant"] = "polynomial"
    """Shape after the warm-up, down to min_lr at decay_steps."""
    decay_power: Annotated[float, Field(gt=0)] = 1.0
    """Power of the polynomial; 1 is linear."""
    decay_steps: Positive | None = None
    """Step at which min_lr is reached; null: train.steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay of matrices and tables; norm weights are not decayed."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's moment decay rates."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's denominator offset."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global L2 norm of the gradient; 0: no clipping."""


class TrainConfig(_Section):
    """Length, batch and rhythm of the run."""

    steps: Positive = 500_000
    """Optimizer steps; the published checkpoints are step 500,000."""
    seq_len_tokens: Positive = 1024
    """Window length."""
    global_batch: Positive = 256
    """Sequences an optimizer step, over all ranks."""
    micro_batch: Positive = 8
    """Sequences a forward pass on one rank; gradient accumulation follows from the rank count."""
    precision: Precision = AUTO
    """Compute precision; bf16 keeps fp32 master weights and moments. auto: bf16 where the device multiplies it natively
    (GPUs since A100, CPUs with AVX512_BF16, AMX or Arm BF16), else fp32; a run keeps what it began with."""
    seed: NonNegative = 1234
    """Of the initial weights and of the sample order."""
    init_from: Folder | None = None
    """Model that a new run begins with: an exported folder, or RUN_DIR[@STEP]; the optimizer begins anew. Null: random
    weights. A run that has a checkpoint goes on from that."""
    log_every: Positive = 10
    """Steps between progress lines; metrics.jsonl gets every step."""
    valid_every: NonNegative = 1000
    """Steps between validation losses; 0: never."""
    valid_samples: Positive = 512
    """Windows of the validation set that are read each time, always the same ones."""
    save_every: NonNegative = 1000
    """Steps between checkpoints; 0: only at the end."""
    check_replicas_every: NonNegative = 100
    """Steps between comparisons of the bits of weights that several ranks hold alike; 0: never."""


class ParallelConfig(_Section):
    """How the model is spread over ranks; each group of tensor x context x pipeline ranks runs one copy of it."""

    tensor: Positive = 1
    """Ranks that share each layer: heads, inner width and vocabulary are split."""
    context: Positive = 1
    """Ranks that share each window: for windows that do not fit on one. Inside attention heads are split instead."""
    pipeline: Positive = 1
    """Stages that the layers are cut into."""
    sequence: bool = False
    """With tensor > 1: what lies between the split layers is split, too, along the window."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again: selective, all but matrix products and attention; full, whole blocks."""
    timeout_s: Positive = 600
    """Longest time without progress, in a micro-batch, in a checkpoint or at the start; then the launch ends, and the
    ranks it waited for are named. The default is what torch gives NCCL's collectives."""

    def data_ranks(self, num_ranks: int) -> int:
        """Copies of the model on `num_ranks` ranks: they share the windows of a batch."""
        return self.replica_ranks(num_ranks) // self.context

    def replica_ranks(self, num_ranks: int) -> int:
        """Ranks that have the same weights: over them ZeRO shares out."""
        return num_ranks // (self.tensor * self.pipeline)


class CheckpointConfig(_Section):
    """How checkpoints are written and which are kept; `train.save_every` says when."""

    asynchronous: bool = True
    """Write beside training, from a copy in the host's memory (12 bytes a parameter, shared out over the ranks); false:
    training waits for the disk."""
    keep_last: NonNegative = 0
    """Newest checkpoints that are kept, the one just written included; 0: all. With 1 there is none to fall back to."""
    keep_every: NonNegative = 0
    """Checkpoints of steps that are a multiple of this are kept whatever `keep_last` says; 0: none is."""
    min_free_gib: Annotated[float, Field(ge=0)] = 1.0
    """Room that a checkpoint must leave on its disk; where it would not, none is begun."""


class HealthConfig(_Section):
    """What counts as training that goes wrong, and what is done about it."""

    patience: Positive = 3
    """Bad steps in a row after which the run goes back to its last checkpoint and passes their samples over; a single
    one is mostly over by itself."""
    spike_deviations: Annotated[float, Field(ge=0)] = 8.0
    """A loss is a spike that exceeds the mean of the last good ones by more than this many of their standard
    deviations; 0: none is. In calm training 8 never comes by chance."""
    spike_window: Annotated[int, Field(ge=2)] = 100
    """Good losses that a spike is compared with; before there are so many, none is."""
    max_returns: NonNegative = 3
    """Returns to one and the same checkpoint; then the run ends with an error."""
    compare_ranks_every: NonNegative = 100
    """Steps over which each rank's own work is added up and compared with that of the others; 0: never."""
    slow_rank: Annotated[float, Field(ge=1)] = 1.5
    """A rank is named as slow whose own work takes longer than this times the median of all ranks."""


class RunConfig(_Section):
    """A whole training run; a YAML file mirrors it section by section."""

    run_dir: Path = Path("runs/bipe_rope_151m")
    """Folder of the run: resolved config, metrics, checkpoints. An existing run is continued."""
    model: ModelConfig = ModelConfig()
    """The network."""
    data: DataConfig = DataConfig()
    """The datasets."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule and its schedule."""
    train: TrainConfig = TrainConfig()
    """Length, batch, rhythm."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout over ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Writing and keeping of checkpoints."""
    health: HealthConfig = HealthConfig()
    """What to do when training goes wrong."""
