"""The weights out of a checkpoint, whole, whatever layout wrote it.

Hides how DeepSpeed lays them out. M is the tensor-parallel rank (of the first stage, where there are stages):

    mp_rank_M_model_states.pt                    one stage, ZeRO 0 to 2
    layer_K-model_M-model_states.pt              stages
    (bf16_)zero_pp_rank_D_mp_rank_M_...          ZeRO 3: shards of every data-parallel rank D
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine.checkpoint import Checkpoint, list_steps
from megatron_bipe.errors import CheckpointError
from megatron_bipe.model.precision import DTYPES
from megatron_bipe.parallel.tensor import shares_of

_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_WHOLE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_rank_(\d+)_(model|optim)_states\.pt")


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights under the plan's names, in the run's compute precision, on the CPU.

    Raises:
        CheckpointError: files are missing or unreadable.
    """
    try:
        return _join(_read_parts(checkpoint), checkpoint)
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"cannot read the weights: {error}",
            remedy=f"Use another step of the run: {', '.join(map(str, list_steps(checkpoint.run_dir)))}",
            place=checkpoint.folder,
        ) from error


def _read_parts(checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    """What each tensor-parallel rank has, over all stages."""
    names = sorted(path.name for path in checkpoint.folder.iterdir())
    if layers := [match for name in names if (match := _LAYER.fullmatch(name))]:
        parts: list[dict[str, Tensor]] = [{} for _ in {match[2] for match in layers}]
        for match in layers:
            states = _load(checkpoint.folder / match[0])
            parts[int(match[2])] |= {f"{int(match[1])}.{name}": weight for name, weight in states.items()}
        return parts
    if whole := [name for name in names if _WHOLE.fullmatch(name)]:
        return [dict(_load(checkpoint.folder / name)["module"]) for name in whole]
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if not shards:
        raise FileNotFoundError("there are no model states in it")
    return [_join_zero3(checkpoint, rank) for rank in sorted({match[1] for match in shards})]


def _join(parts: Sequence[dict[str, Tensor]], checkpoint: Checkpoint) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    shares = shares_of(load_run_config(checkpoint.run_dir / "config.yaml").model, len(parts))
    return {
        name: shares[name].join([part[name] for part in parts]) if name in shares else weight
        for name, weight in parts[0].items()
    }


def _load(path: Path) -> dict[str, Any]:
    states: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return states


def _join_zero3(checkpoint: Checkpoint, rank: str) -> dict[str, Tensor]:
    # Importing deepspeed takes seconds and prints; whoever reads anything but ZeRO-3 shards is spared it.
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    dtype = DTYPES[load_run_config(checkpoint.run_dir / "config.yaml").train.precision]
    with tempfile.TemporaryDirectory() as folder:  # that reader takes all shards of a folder for those of one model
        for path in checkpoint.folder.iterdir():
            match = _SHARD.fullmatch(path.name)
            if match and match[1] == rank:
                (Path(folder) / path.name.replace(f"mp_rank_{rank}", "mp_rank_00")).symlink_to(path.resolve())
        masters = get_fp32_state_dict_from_zero_checkpoint(str(Path(folder).parent), tag=Path(folder).name)
        return {name: weight.to(dtype) for name, weight in masters.items()}
