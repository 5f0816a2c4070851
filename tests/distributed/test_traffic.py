"""The gradient sums of data-parallel ranks in an update of ZeRO 1 and 2, against their estimate."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.estimate.communication import step_traffic
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import DS_CONFIGS, Layout, batches, run_config
from tests.helpers.ranks import run_ranks

RANKS, LR = 2, 1e-3
TO_ALL, TO_OWNER = ("all_reduce",), ("reduce", "reduce_scatter_tensor")
FEW = 64  # elements: norms, losses and flags have fewer
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero 1, fp32": (1, "fp32", {}),
    "zero 1, bf16": (1, "bf16", {}),
    "zero 2": (2, "fp32", {}),
    "zero 2, a rank at a time": (2, "fp32", {"use_multi_rank_bucket_allreduce": False}),
}
OWNERS_ONLY = ("zero 1, bf16", "zero 2, a rank at a time")


def count_sums(mesh: Mesh, work_dir: str) -> dict[str, tuple[float, float, float]]:
    """Return the bytes that this rank sends in one update of two micro-batches: to all, to owners, and estimated."""
    import torch.distributed as dist

    from megatron_bipe.engine import gradients
    from megatron_bipe.engine.engines import ZeroEngine

    found = {}
    for number, (case, (zero, precision, options)) in enumerate(CASES.items()):
        run = run_config(Layout(precision=precision), Path(work_dir) / str(number))
        values = read_ds_config(DS_CONFIGS / f"zero{zero}.json")
        values["zero_optimization"] |= options
        ds_config = engine_config(run, values, RANKS, "")
        engine = ZeroEngine(run, ds_config, mesh)
        num_bytes: Counter[str] = Counter()
        ours = mock.patch.object(gradients, "_reduce_scatter", _counting(dist.reduce_scatter_tensor, num_bytes))
        deepspeeds = {name: _counting(getattr(dist, name), num_bytes) for name in TO_ALL + TO_OWNER}
        with ours, mock.patch.multiple(dist, **deepspeeds):
            engine.train_step(batches(0, mesh), LR)
        ring = (RANKS - 1) / RANKS
        to_all = sum(2 * ring * num_bytes[name] for name in TO_ALL)
        to_owner = sum(ring * num_bytes[name] for name in TO_OWNER)
        estimate = [kind for kind in step_traffic(run, ds_config, RANKS) if kind.what.startswith("gradients")]
        found[case] = to_all, to_owner, estimate[0].bytes_sent
    return found


def _counting(function: Any, num_bytes: Counter[str]) -> Any:
    """Return the collective with a count of the bytes of its largest tensor, the unsharded one."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for arg in [*args, *kwargs.values()] for x in (arg if isinstance(arg, list) else [arg])]
        sizes = [(x.numel(), x.element_size()) for x in tensors if hasattr(x, "numel")]
        elements, width = max(sizes)
        if elements > FEW:
            num_bytes[function.__name__] += elements * width
        return function(*args, **kwargs)

    counted.__name__ = function.__name__
    return counted


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return run_ranks(
        count_sums, RANKS, tmp_path_factory.mktemp("traffic"), work_dir=str(tmp_path_factory.mktemp("runs"))
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_sent_as_estimated(counted, case):
    for to_all, to_owner, estimate in (rank[case] for rank in counted):
        assert (to_all, to_owner) == ((0, estimate) if case in OWNERS_ONLY else (estimate, 0))
