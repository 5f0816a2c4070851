"""ZeRO 0 to 3 and optimizer offload: the same losses and weights as one process, and bit-exact resumption.

Measured over 8 steps (2 ranks against 1, largest over the stages): in fp32 losses differ by 7e-8 relative, gradient
norms by 2e-7 relative, weights by 5e-6 absolute; sums over the batch are taken in another order, and Adam divides
small gradients by their own size. In bf16, where sums of gradients are rounded to 8 bits, losses differ by 1.2e-4.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bipe.config import RunConfig
from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import DS_CONFIGS, batches
from tests.helpers.ranks import run_ranks
from tests.helpers.tiers import selected, slow

STEPS, HALF, LR, ROWS, MICRO = 4, 2, 5e-3, 8, 2
LOSS_TOLERANCE = {"fp32": 1e-6, "bf16": 5e-4}  # relative
WEIGHT_TOLERANCE = 2e-5  # absolute, fp32
Case = tuple[int | str, str]  # ZeRO stage and precision
FAST: list[Case] = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), ("2_offload", "fp32")]
SLOW: list[Case] = [
    (0, "bf16"),
    (2, "bf16"),
    (3, "bf16"),
    ("2_offload", "bf16"),
    ("3_offload", "fp32"),
    ("3_offload", "bf16"),
]
CASES, PLAIN = [*FAST, *slow(SLOW)], (0, "fp32")


def of_precision(precision: str) -> list[Any]:
    return [*(case for case in FAST if case[1] == precision), *slow(case for case in SLOW if case[1] == precision)]


def _run(run_dir: Path, precision: str) -> RunConfig:
    settings = [
        f"run_dir={run_dir}",
        "model={num_layers: 2, hidden_size: 32, num_heads: 4, ffn_size: 48, vocab_size: 64, intra_size: 16}",
        "optimizer={lr: 1e-3, warmup_steps: 0, grad_clip: 0.5}",
        f"train={{steps: 8, seq_len_tokens: 16, global_batch: 8, micro_batch: {MICRO}, precision: {precision}}}",
    ]
    return load_run_config(None, settings)


def outcomes_of(engine, mesh, steps):
    """Return loss and gradient norm of some updates."""
    results = [engine.train_step(batches(step, mesh, ROWS, MICRO), LR) for step in steps]
    return [(float(result.loss_nats), float(result.grad_norm)) for result in results]


def _train(mesh: Mesh, cases: list[Case], work_dir: str) -> dict[Case, dict[str, Any]]:
    """Train every stage and precision, then once more from the checkpoint of half of the steps."""
    from megatron_bipe.checkpoint.find import find_checkpoint
    from megatron_bipe.checkpoint.verify import read_weights
    from megatron_bipe.engine.engines import ZeroEngine

    results = {}
    for stage, precision in cases:
        run = _run(Path(work_dir) / f"{precision}-{stage}", precision)
        path = DS_CONFIGS / f"zero{stage}.json"
        ds_config = engine_config(run, read_ds_config(path), mesh.num_ranks, path)
        engine = ZeroEngine(run, ds_config, mesh)
        outcomes = outcomes_of(engine, mesh, range(HALF))
        engine.save(run.run_dir, HALF)
        outcomes += outcomes_of(engine, mesh, range(HALF, STEPS))
        engine.save(run.run_dir, STEPS)
        held_out = engine.eval_loss(batches(99, mesh, ROWS, MICRO)).mean_nats
        half = find_checkpoint(f"{run.run_dir}@{HALF}").folder
        engine.load(half)  # by an engine that has trained
        rewound = outcomes_of(engine, mesh, range(HALF, STEPS))
        again = ZeroEngine(run, ds_config, mesh)
        again.load(half)
        resumed = outcomes_of(again, mesh, range(HALF, STEPS))
        (run.run_dir / "config.yaml").write_text(f"train: {{precision: {precision}}}")
        results[stage, precision] = {
            "outcomes": outcomes,
            "resumed": resumed,
            "rewound": rewound,
            "held_out": held_out,
            "resumed_held_out": again.eval_loss(batches(99, mesh, ROWS, MICRO)).mean_nats,
            "weights": read_weights(find_checkpoint(run.run_dir)) if mesh.is_main else None,
        }
    return results


@pytest.fixture(scope="module")
def cases(request):
    chosen = selected(request, "case")
    return [*([PLAIN] if PLAIN not in chosen else []), *chosen]


@pytest.fixture(scope="module")
def one(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(_train, 1, folder, cases=cases, work_dir=str(folder))[0]


@pytest.fixture(scope="module")
def two(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run_ranks(_train, 2, folder, cases=cases, work_dir=str(folder))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_two_ranks_give_the_losses_of_one(one, two, case):
    ours, reference = two[0][case]["outcomes"], one[case]["outcomes"]
    losses, expected = [loss for loss, _ in ours], [loss for loss, _ in reference]
    assert losses == pytest.approx(expected, rel=LOSS_TOLERANCE[case[1]])
    assert max(expected) - min(expected) > 0.1  # the weights change
    if case[1] == "fp32":
        norms = [norm for _, norm in ours]
        assert norms == pytest.approx([norm for _, norm in reference], rel=2e-6)
        assert min(norms) > 0.5  # gradients are clipped


@pytest.mark.parametrize("case", of_precision("fp32"), ids=str)
def test_zero_stages_give_the_losses_of_plain_data_parallelism(two, case):
    losses = [loss for loss, _ in two[0][case]["outcomes"]]
    assert losses == pytest.approx([loss for loss, _ in two[0][PLAIN]["outcomes"]], rel=LOSS_TOLERANCE["fp32"])


@pytest.mark.parametrize("case", of_precision("bf16"), ids=str)
def test_zero_bf16_learns_what_fp32_does(two, case):
    """Measured: 3.1e-4. With the step that DeepSpeed takes at the start without ZeRO it was 1.7e-2."""
    losses, expected = ([loss for loss, _ in two[0][key]["outcomes"]] for key in (case, PLAIN))
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("case", of_precision("fp32"), ids=str)
def test_zero_weights_read_unsharded_are_those_of_one_process(one, two, case):
    ours, reference = two[0][case]["weights"], one[PLAIN]["weights"]
    assert set(ours) == set(reference)
    for name, weight in reference.items():
        assert (ours[name] - weight).abs().max() < WEIGHT_TOLERANCE, name


@pytest.mark.parametrize("case", of_precision("bf16"), ids=str)
def test_zero_weights_come_in_compute_precision(two, case):
    assert {w.dtype for w in two[0][case]["weights"].values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_resumed_run_is_bit_identical_to_the_uninterrupted_one(one, two, case):
    for results in (one, *two):
        result = results[case]
        assert result["resumed"] == result["rewound"] == result["outcomes"][HALF:]
        assert result["resumed_held_out"] == result["held_out"]


def _gradients_at_the_update(mesh: Mesh, work_dir: str) -> tuple[float, bool]:
    """Return which share of AdamW's gradients bf16 cannot represent, and whether bf16 gradients remain in memory."""
    from megatron_bipe.engine.engines import ZeroEngine

    run = _run(Path(work_dir), "bf16")
    run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"grad_clip": 0.0})})
    path, found = DS_CONFIGS / "zero1.json", []
    engine = ZeroEngine(run, engine_config(run, read_ds_config(path), mesh.num_ranks, path), mesh)

    def look(optimizer, *_):
        gradients = torch.cat([p.grad for group in optimizer.param_groups for p in group["params"]])
        remain = any(p.grad is not None for p in engine._engine.module.parameters())
        found.append((float((gradients != gradients.bfloat16().float()).float().mean()), remain))

    engine._optimizer.optimizer.register_step_pre_hook(look)
    engine.train_step(batches(0, mesh, ROWS, MICRO), LR)
    return found[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_1_passes_fp32_sums_of_bf16_gradients_to_the_optimizer(ranks, tmp_path):
    for finer, remain in run_ranks(_gradients_at_the_update, ranks, tmp_path, work_dir=str(tmp_path)):
        assert finer > 0.5  # measured: 0.67 to 0.78; 0 as DeepSpeed exchanges them by default
        assert not remain


def test_zero_all_ranks_report_the_same(two):
    for key, result in two[0].items():
        assert result["outcomes"] == two[1][key]["outcomes"]
        assert result["held_out"] == two[1][key]["held_out"]
