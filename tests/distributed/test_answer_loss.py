"""The loss over answers is the exact mean over the answers of the global batch, in every kind of layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bipe.config import DataConfig
from megatron_bipe.data.manifest import PromptAnswerRecord
from megatron_bipe.data.prompt_answer import open_dataset
from megatron_bipe.model.loss import token_losses
from megatron_bipe.model.transformer import build_model
from tests.helpers.layouts import FP32, LR, Layout, Placed, run_config, run_placed, start
from tests.helpers.tiers import selected, slow

SEQ, GLOBAL, STEPS = 16, 16, 4  # as layouts.py has them
NUM_VALID = 41
ONE = Layout()
FAST = [Layout(zero=1), Layout(pipeline=2, zero=1), Layout(tensor=2, zero=2, sequence=True)]
SLOW = [Layout(zero=3), Layout(context=2, zero=1)]


def train(mesh, layouts, data, work_dir):
    """Return losses and norms of `STEPS` updates, and the held-out losses before and after, by layout."""
    from megatron_bipe.train.batch_loader import BatchLoader

    found = {}
    for number, layout in enumerate(layouts):
        run_dir = Path(work_dir) / str(number)
        engine, mesh_here = start(layout, mesh, run_dir)
        loader = BatchLoader(_run(layout, data, run_dir), mesh_here)
        at_start = engine.eval_loss(loader.valid_batches(*loader.validations)).mean_nats
        results = [engine.train_step(loader.train_batches(GLOBAL * step), LR) for step in range(STEPS)]
        losses = [float(result.loss_nats) for result in results]
        found[layout] = (
            losses,
            [float(result.grad_norm) for result in results],
            [at_start, engine.eval_loss(loader.valid_batches(*loader.validations)).mean_nats],
        )
    return found


def _run(layout, data, run_dir):
    run = run_config(layout, run_dir)
    return run.model_copy(update={"data": DataConfig(path=Path(data) / "train", valid_path=Path(data) / "valid")})


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_dataset):
    """Write examples with answers of one token up to a full sequence, so that micro-batches differ in their numbers."""
    folder, generator = tmp_path_factory.mktemp("answers"), np.random.default_rng(5)
    for name, count in (("train", 40), ("valid", NUM_VALID)):
        documents = []
        for _ in range(count):
            length = int(generator.integers(2, SEQ + 1))
            prompt = int(generator.integers(1, length))
            tokens = generator.integers(2, 64, length).tolist()
            documents += [tokens[:prompt], tokens[prompt:]]
        record = PromptAnswerRecord(task="noise", seq_len_tokens=SEQ)
        write_dataset(folder / name, [documents], vocab_size=64, examples=record)
    return folder


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, data):
    placed = [Placed(1, ONE), *(Placed(2, layout) for layout in selected(request, "layout"))]
    return run_placed(train, placed, tmp_path_factory.mktemp("trained"), data=str(data))


def test_loss_over_answers_is_their_exact_mean(found, data, tmp_path):
    [(losses, _, _)] = found[Placed(1, ONE)]
    assert losses[0] == pytest.approx(_expected(data, tmp_path), rel=FP32.loss)


@pytest.mark.parametrize("layout", [*FAST, *slow(SLOW)], ids=str)
def test_loss_over_answers_is_that_of_one_process_in_every_layout(found, layout):
    [(losses, norms, held_out)] = found[Placed(1, ONE)]
    for its_losses, its_norms, its_held_out in found[Placed(2, layout)]:
        assert its_losses == pytest.approx(losses, rel=FP32.loss)
        assert its_norms == pytest.approx(norms, rel=FP32.norm)
        assert its_held_out == pytest.approx(held_out, rel=FP32.loss)
        if layout.tensor == layout.context == 1:  # the same sums, in another order
            assert its_held_out[0] == held_out[0]


def test_held_out_loss_is_the_mean_over_all_examples_though_they_do_not_fill_the_batches(found, data, tmp_path):
    [(_, _, [at_start, _])] = found[Placed(1, ONE)]
    assert at_start == pytest.approx(_expected(data, tmp_path, "valid", range(NUM_VALID)), rel=FP32.loss)


def _expected(data, folder, name="train", indices=None):
    """Compute the initial loss by plain loops over the answers of examples, by default of the first global batch."""
    run = _run(ONE, data, folder / "plain")
    dataset = open_dataset(data / name)
    model = build_model(run.model, run.train.seed)
    from megatron_bipe.data.blend import Blend

    if indices is None:
        indices = Blend([dataset], None, SEQ, run.train.seed).sequence_indices(0, GLOBAL)
    total, count = 0.0, 0
    for window in indices:
        (prompt, answer) = (dataset.tokens(*bounds) for bounds in _documents(dataset, int(window)))
        tokens = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
        starts, intra, inter = 0, [], []  # a segment ends after a 5
        for position in range(tokens.shape[1] - 1):
            intra.append(min(position - starts, 15))
            inter.append(inter[-1] if inter else 0)
            if position and tokens[0, position - 1] == 5:
                starts, intra[-1], inter[-1] = position, 0, inter[-1] + 1
        both_ids = (torch.tensor([ids]) for ids in (intra, inter))
        with torch.no_grad():
            losses = token_losses(model((tokens[:, :-1], *both_ids)), tokens[:, 1:])[0]
        total += float(losses[len(prompt) - 1 :].sum())
        count += len(answer)
    return total / count


def _documents(dataset, example):
    bounds = dataset.document_bounds().tolist()
    return [(bounds[position], bounds[position + 1]) for position in (2 * example, 2 * example + 1)]
