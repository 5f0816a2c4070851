"""The run configuration: typed fields, YAML and `--set`, rules between fields, and the settings given to DeepSpeed."""

from megatron_bipe.config.deepspeed import engine_config, offloads, read_ds_config, zero_stage
from megatron_bipe.config.encodings import ABSOLUTE, ENCODINGS
from megatron_bipe.config.load import Sources, dump_yaml, load_run_config, nearest, read_yaml, validation_problems
from megatron_bipe.config.model_schema import ModelConfig, Positive, RopeScaling, Section
from megatron_bipe.config.schema import (
    ALLOWABLE,
    AUTO,
    PRECISIONS,
    AlertsConfig,
    CheckpointConfig,
    ComputePrecision,
    DataConfig,
    HealthConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    StoredPrecision,
    TrackerConfig,
    TrackingConfig,
    TrainConfig,
)
from megatron_bipe.config.validate import accumulation_steps, check_data, validate_run

__all__ = [
    "ABSOLUTE",
    "ALLOWABLE",
    "AUTO",
    "ENCODINGS",
    "PRECISIONS",
    "AlertsConfig",
    "CheckpointConfig",
    "ComputePrecision",
    "DataConfig",
    "HealthConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Positive",
    "Precision",
    "RopeScaling",
    "RunConfig",
    "Section",
    "Sources",
    "StoredPrecision",
    "TrackerConfig",
    "TrackingConfig",
    "TrainConfig",
    "accumulation_steps",
    "check_data",
    "dump_yaml",
    "engine_config",
    "load_run_config",
    "nearest",
    "offloads",
    "read_ds_config",
    "read_yaml",
    "validate_run",
    "validation_problems",
    "zero_stage",
]
