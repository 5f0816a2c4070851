"""Memory of an export against the size of its shards: the most anonymous memory of the process, files not counted."""

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from _machine import describe_machine

sys.path.insert(0, str(Path(__file__).parents[1]))  # the other tools' helpers

from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.config.load import dump_yaml
from megatron_bipe.config.schema import ModelConfig, RunConfig, TrainConfig
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.eval.convert import random_sequences
from megatron_bipe.eval.eval_model import LazyCheckpointWeights
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.hf_config import DataFields
from megatron_bipe.model.transformer import build_model
from megatron_bipe.runtime.child_processes import leave_with_parent
from megatron_bipe.train.warm_start import write_step_zero

RULE = SegmentRule(spec="[3,5]", token_ids=(3, 5))
SEQ_LEN_TOKENS = 64


def main() -> None:
    """Parse the command line, make a checkpoint, export it, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="blocks, 768 wide (default: %(default)s)")
    parser.add_argument("--shards", default="50,10000", metavar="MB,MB,...", help="sizes (default: %(default)s)")
    arguments = parser.parse_args()
    print(describe_machine("torch", "transformers", "safetensors"))
    run_dir = Path(tempfile.mkdtemp())
    try:
        run = RunConfig(
            run_dir=run_dir, model=ModelConfig(num_layers=arguments.layers), train=TrainConfig(precision="fp32")
        )
        (run_dir / "config.yaml").write_text(dump_yaml(run))
        weights = dict(build_model(run.model).named_parameters())
        megabytes = sum(4 * weight.numel() for weight in weights.values()) / 1e6
        largest = max(4 * weight.numel() for weight in weights.values()) / 1e6
        write_step_zero(run, None, {name: weight.detach() for name, weight in weights.items()})
        del weights
        print(f"\n{megabytes:,.0f} MB of fp32 weights, the largest of {largest:,.0f} MB, beyond the imports\n")
        print(f"{'shards of MB':>14} {'peak MB':>10} {'of the model':>14} {'s':>8}")
        for size in map(int, arguments.shards.split(",")):
            peak_mb, seconds = _measure(run_dir, run.model, size)
            print(f"{size:14,} {peak_mb:10,.0f} {peak_mb / megabytes:14.2f} {seconds:8.1f}", flush=True)
    finally:
        shutil.rmtree(run_dir)


def _measure(run_dir: Path, config: ModelConfig, shard_mb: int) -> tuple[float, float]:
    """Peak of anonymous memory over that before the export, in MB, and its seconds."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=_export, args=(run_dir, config, shard_mb, ready, go), daemon=True)
    process.start()
    ready.wait()
    base, peak, began_s = _anonymous_mb(process.pid), 0.0, time.perf_counter()
    go.set()
    while process.is_alive():
        peak = max(peak, _anonymous_mb(process.pid))
        time.sleep(0.002)
    return peak - base, time.perf_counter() - began_s


def _export(run_dir: Path, config: ModelConfig, shard_mb: int, ready: object, go: object) -> None:
    leave_with_parent()
    sequences = random_sequences(config, RULE, SEQ_LEN_TOKENS, rows=1)
    options = ExportOptions(torch.float32, max_shard_bytes=shard_mb * 10**6, overwrite=True)
    ready.set()  # type: ignore[attr-defined]
    go.wait()  # type: ignore[attr-defined]
    weights = LazyCheckpointWeights(find_checkpoint(run_dir))
    export_model(weights, config, run_dir / "model", DataFields("[3,5]", (3, 5), None, {}), sequences, None, options)


def _anonymous_mb(pid: int | None) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon")), 0.0)


if __name__ == "__main__":
    main()
