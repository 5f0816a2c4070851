"""Training on the device against a plain loop on the CPU: one process trains everything that these tests ask about.

It is a new process, not a fork of the tests' server, which has imported torch for the CPU.
"""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bipe.model import LocalLayers, build_model
from tests.helpers.layouts import LR, STEPS, Layout, batches, run_config, start_engine_of, train_steps

# Largest relative difference of a loss. Layouts on a CPU differ by at most 2e-6 in fp32; a GPU has not been measured.
FP32, BF16 = 5e-6, 2e-2
LAYOUTS = {
    **{f"ZeRO {zero}": Layout(zero=zero) for zero in range(4)},
    "selective": Layout(recompute="selective"),
    "full": Layout(recompute="full"),
    "bipe_alibi": Layout("bipe_alibi"),
    "bf16": Layout(precision="bf16"),
}
HALF = STEPS // 2


@pytest.fixture(scope="module")
def answers(device, tmp_path_factory):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(answer, str(tmp_path_factory.mktemp("runs"))).result()


def answer(work_dir: str) -> dict[str, Any]:
    """Return what the tests below ask about; runs in a process of its own."""
    from megatron_bipe.engine.base import on_device
    from megatron_bipe.runtime.distributed_init import join_launch

    folder, deterministic = Path(work_dir), {"deterministic": True}
    # CUDA's options are those of the run that a process joins with; cuBLAS reads its variable once.
    mesh = join_launch(run=_eager(Layout(), folder, **deterministic))
    found: dict[str, Any] = {"device": mesh.device.type, "deterministic": torch.are_deterministic_algorithms_enabled()}
    found["repeated"] = [_train_with(deterministic, folder / str(number), mesh) for number in range(2)]
    torch.use_deterministic_algorithms(False)
    for name, layout in LAYOUTS.items():
        engine, here = start_engine_of(_eager(layout, folder / name), mesh, layout.zero)
        found[name] = train_steps(engine, here, range(STEPS))[0]
        found[f"NaN {name}"] = _update_with_nan(engine, here)
    found["resumed"] = _saved_and_resumed(folder / "resumed", mesh)
    compiles = "on" if mesh.device.type == "cuda" else "off"  # a CPU has no time to compile
    found["compiled"], _ = _train_with({"compile": compiles}, folder / "compiled", mesh)
    batch = batches(0, mesh)[0]
    found["moved"] = [x.cpu() for x in on_device(batch, mesh.device) if x is not None]
    return found


def _eager(layout, run_dir, **changes):
    """Return a run with other settings of the section `train`; compiling each layout would take minutes on a GPU."""
    run = run_config(layout, run_dir)
    return run.model_copy(update={"train": run.train.model_copy(update={"compile": "off"} | changes)})


def _train_with(changes, run_dir, mesh):
    """Return losses and the weights of a run with other settings of the section `train`."""
    engine, here = start_engine_of(_eager(Layout(), run_dir, **changes), mesh, 1)
    return train_steps(engine, here, range(STEPS))[0], _state(engine)


def _state(engine):
    from megatron_bipe.engine.deepspeed_internals import fragments

    held = fragments(engine._engine.module, engine._optimizer)
    return {f"{f.name} {kind}": tensor.cpu().clone() for f in held for kind, tensor in f.state.items()}


def _update_with_nan(engine, mesh):
    """Return the gradient norm of an update in which one loss is NaN, and the state that it changed."""
    good = batches(7, mesh)
    bad = good[-1]._replace(weights_BT=torch.full(good[-1].labels_BT.shape, math.nan))
    before = _state(engine)
    norm = float(engine.train_step([*good[:-1], bad], LR).grad_norm)
    return norm, [key for key, tensor in _state(engine).items() if not torch.equal(tensor, before[key])]


def _saved_and_resumed(run_dir, mesh):
    """Return the losses after a checkpoint, by the engine that wrote it and by another one that loaded it."""
    from megatron_bipe.checkpoint.find import find_checkpoint

    run = _eager(Layout(), run_dir)
    engine, here = start_engine_of(run, mesh, 1)
    train_steps(engine, here, range(HALF))
    engine.save(run_dir, HALF, final=False)  # in the background
    continued = train_steps(engine, here, range(HALF, STEPS))[0]
    engine._saver.finish()
    again, here = start_engine_of(run, mesh, 1)
    again.load(find_checkpoint(run_dir).folder)
    return continued, train_steps(again, here, range(HALF, STEPS))[0]


@pytest.fixture(scope="module")
def expected():
    """Return a function that gives the losses of a plain loop on the CPU in fp32, by encoding."""
    losses = {encoding: _plain_loop(Layout(encoding)) for encoding in ("bipe_rope", "bipe_alibi")}
    return losses.__getitem__


def _plain_loop(layout):
    run, layers = run_config(layout, Path("none")), LocalLayers()
    model = build_model(run.model, run.train.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    config = run.optimizer
    optimizer = torch.optim.AdamW(groups, LR, config.betas, config.eps, weight_decay=config.weight_decay)
    losses = []
    for step in range(STEPS):
        micro_batches = batches(step, _one_rank())
        total = 0.0
        for batch in micro_batches:
            loss = layers.token_losses(model(batch[:3]), batch.labels_BT).mean() / len(micro_batches)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _one_rank():
    from megatron_bipe.parallel.mesh import Mesh

    return Mesh(0, 0, 1, 1, torch.device("cpu"))


def _difference(found, wanted):
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_a_plain_loop_on_the_cpu(answers, expected, name):
    assert _difference(answers[name], expected(LAYOUTS[name].encoding)) < (BF16 if name == "bf16" else FP32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_update_with_nan_changes_nothing(answers, name):
    norm, changed = answers[f"NaN {name}"]
    assert not math.isfinite(norm) and not changed


def test_run_resumed_from_a_checkpoint_in_the_background_has_the_same_losses(answers):
    continued, resumed = answers["resumed"]
    assert _difference(resumed, continued) < FP32


def test_compiled_blocks_have_the_losses_of_eager_ones(answers, expected):
    assert _difference(answers["compiled"], expected("bipe_rope")) < FP32


def test_deterministic_training_gives_the_same_bits_again(answers):
    assert answers["deterministic"] == (answers["device"] == "cuda")  # a CPU is deterministic without the setting
    (losses, state), (losses_again, state_again) = answers["repeated"]
    assert losses == losses_again
    assert all(torch.equal(state[key], state_again[key]) for key in state)


def test_batch_arrives_on_the_device_unchanged(answers, device):
    assert answers["device"] == device.type
    sent = [x for x in batches(0, _one_rank())[0] if x is not None]
    assert all(torch.equal(a, b) for a, b in zip(answers["moved"], sent, strict=True))
