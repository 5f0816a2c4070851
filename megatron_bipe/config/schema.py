"""Typed run configuration; every field states its unit and the reason for its default.

Defaults are the 151M BiPE-RoPE recipe of the paper. Rules on a single field are expressed as types here, rules on
several fields are in `validate.py`, and `load.py` reads the values.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, SecretStr, Tag

from megatron_bipe.config.model_schema import ModelConfig, Positive, Section

NonNegative = Annotated[int, Field(ge=0)]
ComputePrecision = Literal["bf16", "fp32"]
StoredPrecision = Literal["bf16", "fp16", "fp32"]  # of an exported model
Precision = Literal["auto", "bf16", "fp32"]
Compile = Literal["auto", "on", "off"]
AUTO: Literal["auto"] = "auto"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# Fields that a resumed run may change with `--allow`: the training state stays valid, but the loss curve changes. Other
# changes would invalidate the weights, or read some sequences twice and others never.
ALLOWABLE = ("optimizer", "train.precision", "data")


def _variant_of(path: object) -> str | None:
    """Return the variant of `DataPath` that a value has, so that errors are about that variant only."""
    variants = {str: "folder", Path: "folder", list: "folders", tuple: "folders", dict: "weights"}
    return next((variant for kind, variant in variants.items() if isinstance(path, kind)), None)


Weight = Annotated[float, Field(gt=0)]


def _without_shell_syntax(path: Any) -> Any:
    """Refuse what a shell would expand in a path, since nothing does here."""
    if str(path) == "" or str(path).startswith(("~", "$")):
        raise ValueError("write the complete path; ~ and $NAME are not replaced here")
    return path


Folder = Annotated[str, Field(min_length=1), AfterValidator(_without_shell_syntax)]
FolderPath = Annotated[Path, BeforeValidator(_without_shell_syntax)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
VALID = "valid"  # name of the validation set of `data.valid_path`
DataPath = Annotated[
    Annotated[FolderPath, Tag("folder")]
    | Annotated[tuple[Folder, ...], Field(min_length=1), Tag("folders")]
    | Annotated[dict[Folder, Weight], Field(min_length=1), Tag("weights")],
    Discriminator(
        _variant_of,
        custom_error_type="data_path",
        custom_error_message="Input should be a dataset folder, a list of folders, or a mapping of folders to weights",
    ),
]


class DataConfig(Section):
    """Training and validation datasets."""

    path: DataPath = Path("data/pile")
    """Dataset folder made by tools/preprocess.py or tools/prepare_task.py. Several are a blend: `{FOLDER: WEIGHT, ...}`
    samples them in proportion to the weights, `[FOLDER, ...]` in proportion to their tokens."""
    valid_path: FolderPath | None = None
    """Dataset folder for the validation loss, as a set named "valid"; null: no validation unless `valid` names sets,
    since no held-out dataset exists by default."""
    valid: dict[SetName, FolderPath] = Field(default={})
    """Several validation sets, `{NAME: FOLDER, ...}`, in place of `valid_path`; progress lines show the first one."""
    segments: str | None = None
    """Segment rule that the dataset must have been made with; another one is an error. Null: any rule, since the data
    records its own."""
    verify: bool = True
    """Verify the checksum of each shard in the background when it is first read, and check every minute that the files
    are unchanged; each rank verifies a part of the shards. On by default: damaged tokens would not show in the loss."""

    @property
    def valid_sets(self) -> dict[str, Path]:
        """Folder of each validation set by its name, in the given order; empty: no validation."""
        return self.valid or ({} if self.valid_path is None else {VALID: self.valid_path})

    @property
    def folders(self) -> tuple[Path, ...]:
        """Dataset folders of the training data, in the given order."""
        return (self.path,) if isinstance(self.path, Path) else tuple(map(Path, self.path))

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Relative sampling weight of each folder; None: in proportion to its tokens."""
        return tuple(self.path.values()) if isinstance(self.path, dict) else None


class OptimizerConfig(Section):
    """AdamW with the values of the published recipe."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate, reached at the end of the warm-up; the default is that of the published recipe."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay, and the lowest of inverse_sqrt; with 0 the rate vanishes there."""
    warmup_steps: NonNegative = 10_000
    """Steps of the linear warm-up from 0 to lr: 2% of the published recipe. 0: none."""
    decay: Literal["polynomial", "cosine", "1-sqrt", "inverse_sqrt", "constant"] = "polynomial"
    """Shape of the decay from decay_start down to min_lr at decay_steps. constant: lr is kept; inverse_sqrt: in
    proportion to 1 / sqrt(step) from the end of the warm-up on, without an end."""
    decay_start: NonNegative | None = None
    """Step at which the decay starts, after a stable phase at lr; null: at the end of the warm-up, without a stable
    phase, as in the published recipe."""
    decay_power: Annotated[float, Field(gt=0)] = 1.0
    """Power of the polynomial decay; 1 is linear, as in the published recipe."""
    decay_steps: Positive | None = None
    """Step at which min_lr is reached; null: train.steps. Set it if runs of different lengths follow one schedule. It
    has no effect on constant and inverse_sqrt."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of matrices and embeddings, multiplied by the learning rate; norm weights are not
    decayed."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of Adam's first and second moment, per step; the defaults are Adam's own."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Term that Adam adds to the denominator; the default is Adam's own."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global L2 norm of the gradient; a larger gradient is scaled down to it. 0: no clipping."""


class TrainConfig(Section):
    """Length, batch size and intervals of the run."""

    steps: Positive = 500_000
    """Optimizer steps of the run; the published checkpoints are of step 500,000."""
    seq_len_tokens: Positive = 1024
    """Sequence length, in tokens; the default is that of the paper."""
    global_batch: Positive = 256
    """Sequences per optimizer step, over all ranks; the default is 8 x 32, inferred from the published code."""
    micro_batch: Positive = 8
    """Sequences per forward pass of one model replica. The number of gradient accumulation steps follows: global_batch
    / (micro_batch x replicas). Lower it if a rank runs out of memory; the result changes only by rounding."""
    precision: Precision = AUTO
    """Compute precision; bf16 keeps fp32 master weights and moments. auto: bf16 where the device multiplies it natively
    (GPUs since A100, CPUs with AVX512_BF16, AMX or Arm BF16), else fp32; a resumed run keeps its precision."""
    compile: Compile = AUTO
    """Fuse the operations of each transformer block, and of the loss, with torch.compile. auto: on a GPU, where most of
    them are limited by memory traffic; off on a CPU and with ZeRO 3, where `on` is an error. Results differ by
    rounding."""
    deterministic: bool = False
    """Use deterministic kernels only, so that a GPU gives the same bits each time; attention's backward is slower. On a
    CPU training is deterministic without it."""
    seed: NonNegative = 1234
    """Random seed of the initial weights and of the order of samples; any number is as good as another."""
    init_from: Folder | None = None
    """Model that a new run starts from: an exported folder, any LlamaForCausalLM, or RUN_DIR[@STEP]; the optimizer
    state is new. Null: random weights. A run that has a checkpoint resumes from it instead."""
    branch_from: Folder | None = None
    """Checkpoint `RUN_DIR@STEP` of another run that a new run continues, with its weights, moments, step and samples. A
    run that has a checkpoint resumes from it instead. Null: the run begins at step 0."""
    log_every: Positive = 10
    """Steps between progress lines; metrics.jsonl gets every step. Losses are read from the device at these steps only,
    so that the steps between them need not wait for it."""
    valid_every: NonNegative = 1000
    """Steps between validations; 0: never."""
    valid_samples: Positive = 512
    """Size of a validation in sequences of train.seq_len_tokens, for each set and length: the same text each time, in
    every layout and at every length, so that losses can be compared."""
    valid_lengths: tuple[Positive, ...] = ()
    """Sequence lengths of the validations, in tokens; those beyond train.seq_len_tokens show extrapolation. Empty:
    train.seq_len_tokens alone."""
    save_every: NonNegative = 1000
    """Steps between checkpoints; 0: only at the end. tools/plan.py estimates the best interval for a cluster."""
    check_replicas_every: NonNegative = 100
    """Steps between bitwise comparisons of replicated weights across ranks; 0: never. The comparison is cheap at
    the default: docs/reliability.md has measurements."""


class ParallelConfig(Section):
    """Parallel layout; each group of tensor x context x pipeline ranks holds one replica of the model."""

    tensor: Positive = 1
    """Number of tensor-parallel ranks, over which heads, feed-forward width and vocabulary are sharded; 1: not
    sharded."""
    context: Positive = 1
    """Number of ranks over which each sequence is sharded, for sequences whose activations do not fit on one rank;
    inside attention, heads are sharded instead. 1: not sharded."""
    pipeline: Positive = 1
    """Number of pipeline stages into which the layers are divided; needs ZeRO 0 or 1. 1: no pipeline."""
    sequence: bool = False
    """With tensor > 1: also shard the activations between tensor-parallel layers along the sequence, which saves
    memory."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that backward recomputes instead of keeping them. selective: all but matrix products and attention;
    full: complete blocks; none: nothing, which is the fastest if memory suffices."""
    timeout_s: Positive = 600
    """Longest time without progress in a micro-batch, a checkpoint or at the start, in seconds. After it the launch
    ends, and the output names the ranks that it waited for. The default is torch's timeout for NCCL collectives."""

    def data_ranks(self, num_ranks: int) -> int:
        """Return the number of model replicas, over which the sequences of a batch are sharded."""
        return self.replica_ranks(num_ranks) // self.context

    def replica_ranks(self, num_ranks: int) -> int:
        """Return the number of ranks that hold the same weights; ZeRO shards over them."""
        return num_ranks // (self.tensor * self.pipeline)


class CheckpointConfig(Section):
    """Writing and retention of checkpoints; `train.save_every` is their interval."""

    asynchronous: bool = True
    """Write in the background, from a copy in host memory (12 bytes per parameter, sharded over the ranks), so that
    training does not wait for the disk; false: wait for it."""
    keep_last: NonNegative = 0
    """Number of newest checkpoints to keep, including the one just written; 0: all, so that nothing is deleted unless
    asked for. With 1 there is no other checkpoint to use if that one is damaged."""
    keep_every: NonNegative = 0
    """Keep checkpoints of steps that are a multiple of this, regardless of `keep_last`; 0: none."""
    max_failures: NonNegative = 3
    """Checkpoints in a row that could not be written, after which the run ends with an error, since it would lose all
    further steps; 0: never. The one that decides is not written in the background; with 1, none is. A few failures
    may pass, such as of a disk that is full for a while."""
    after_save: Annotated[str, Field(min_length=1)] | None = None
    """Shell command that the main rank runs in the background after each checkpoint, for example to upload it, with
    BIPE_CHECKPOINT, BIPE_STEP and BIPE_RUN_DIR in its environment. Its failure is an event and does not end the run.
    Null: none."""
    min_free_gib: Annotated[float, Field(ge=0)] = 1.0
    """Disk space in GiB that must remain free after a checkpoint; otherwise it is not written, so that logs and metrics
    still can be."""


class HealthConfig(Section):
    """Detection of training anomalies, and the response to them."""

    patience: Positive = 3
    """Consecutive bad steps after which the run rolls back to its last checkpoint and skips their samples; a single bad
    step usually recovers by itself."""
    spike_deviations: Annotated[float, Field(ge=0)] = 8.0
    """A loss is a spike if it exceeds the mean of the last good losses by more than this many of their standard
    deviations; 0: never. In stable training, 8 is never reached by chance."""
    spike_window: Annotated[int, Field(ge=2)] = 100
    """Number of good losses that a loss is compared with; until there are that many, none is a spike."""
    max_returns: NonNegative = 3
    """Rollbacks to the same checkpoint before the run ends with an error, since more would not help either."""
    compare_ranks_every: NonNegative = 100
    """Steps between comparisons of the compute time of all ranks; 0: never."""
    slow_rank: Annotated[float, Field(ge=1)] = 1.5
    """Factor by which a rank's compute time must exceed the median of all ranks for it to be reported as slow."""


class TrackerConfig(Section):
    """Destination of the metrics in an experiment tracker."""

    project: Annotated[str, Field(min_length=1)] = "megatron_bipe"
    """Project that the run appears in."""
    name: str | None = None
    """Name of the run; null: that of its folder."""


class TrackingConfig(Section):
    """Experiment trackers that receive the metrics in addition to metrics.jsonl and TensorBoard."""

    trackio: TrackerConfig | None = None
    """Trackio, which stores runs on this machine; needs `pip install -e '.[trackio]'`. Null: not used."""
    wandb: TrackerConfig | None = None
    """Weights & Biases; needs `pip install -e '.[wandb]'`. Null: not used."""


class AlertsConfig(Section):
    """Messages about events of the run."""

    webhook: SecretStr | None = None
    """URL that receives a JSON message at starts, stops, rollbacks, slow ranks, failures and the end. It is a secret:
    the run folder and logs do not show it. Null: the environment variable BIPE_WEBHOOK, or none if that is not set."""


class RunConfig(Section):
    """Configuration of a training run; a YAML file mirrors it section by section."""

    run_dir: FolderPath = Path("runs/bipe_rope_151m")
    """Folder of the run, which receives everything that docs/run_folder.md describes. An existing run is resumed."""
    model: ModelConfig = ModelConfig()
    """The network."""
    data: DataConfig = DataConfig()
    """The datasets."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule and its schedule."""
    train: TrainConfig = TrainConfig()
    """Length, batch size, intervals."""
    parallel: ParallelConfig = ParallelConfig()
    """The parallel layout."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Writing and retention of checkpoints."""
    health: HealthConfig = HealthConfig()
    """Response to training anomalies."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment trackers."""
    alerts: AlertsConfig = AlertsConfig()
    """Messages about events."""

    @property
    def valid_tokens(self) -> int:
        """Largest number of tokens of a set that a validation reads."""
        return self.train.valid_samples * self.train.seq_len_tokens

    @property
    def valid_lengths(self) -> tuple[int, ...]:
        """Sequence lengths of the validations, with the default applied."""
        return self.train.valid_lengths or (self.train.seq_len_tokens,)

    @property
    def decay_end(self) -> int | None:
        """Step at which the learning rate reaches `optimizer.min_lr`; None: it does not decay."""
        endless = self.optimizer.decay in ("constant", "inverse_sqrt")
        return None if endless else self.optimizer.decay_steps or self.train.steps
