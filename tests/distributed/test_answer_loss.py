"""The loss over answers is the exact mean over the answers of the global batch, in every kind of layout.

And the loss of a validation of text is that of an evaluation of the same weights.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bipe.config import DataConfig
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import PromptAnswerRecord
from megatron_bipe.data.prompt_answer import open_dataset
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.perplexity import EvalSettings, evaluate_documents, evaluate_perplexity
from megatron_bipe.model.loss import token_losses
from megatron_bipe.model.transformer import build_model
from tests.helpers.layouts import FP32, LR, Layout, Placed, run_config, run_placed, start
from tests.helpers.tiers import selected, slow

SEQ, GLOBAL, STEPS = 16, 16, 4  # as layouts.py has them
NUM_VALID = 41
LENGTHS, SAMPLES = (8, SEQ, 48), 13
ONE = Layout()
FAST = [Layout(zero=1), Layout(pipeline=2, zero=1), Layout(tensor=2, zero=2, sequence=True)]
SLOW = [Layout(zero=3), Layout(context=2, zero=1)]


def train(mesh, layouts, data, work_dir):
    """Train each layout for `STEPS` updates.

    Returns:
        By layout: losses and norms of the updates, held-out losses over answers before and after them, and results on
        text and the weights after them; the weights on the main rank.
    """
    from megatron_bipe.checkpoint.find import find_checkpoint
    from megatron_bipe.checkpoint.verify import read_weights
    from megatron_bipe.config.load import dump_yaml
    from megatron_bipe.train.batch_loader import BatchLoader

    found = {}
    for number, layout in enumerate(layouts):
        run_dir = Path(work_dir) / str(number)
        engine, mesh_here = start(layout, mesh, run_dir)
        loader = BatchLoader(_run(layout, data, run_dir), mesh_here)
        at_start = engine.eval_loss(loader.valid_batches(*loader.validations)).mean_nats
        results = [engine.train_step(loader.train_batches(GLOBAL * step), LR) for step in range(STEPS)]
        losses = [float(result.loss_nats) for result in results]
        text = BatchLoader(_text_run(layout, data, run_dir), mesh_here)
        on_text = [each.result(engine.eval_loss(text.valid_batches(each))) for each in text.validations]
        engine.save(run_dir, STEPS)
        if mesh.is_main:
            (run_dir / "config.yaml").write_text(dump_yaml(run_config(layout, run_dir)))
        found[layout] = (
            losses,
            [float(result.grad_norm) for result in results],
            [at_start, engine.eval_loss(loader.valid_batches(*loader.validations)).mean_nats],
            on_text,
            read_weights(find_checkpoint(run_dir)) if mesh.is_main else None,
        )
    return found


def _run(layout, data, run_dir):
    run = run_config(layout, run_dir)
    return run.model_copy(update={"data": DataConfig(path=Path(data) / "train", valid_path=Path(data) / "valid")})


def _text_run(layout, data, run_dir):
    run, folder = run_config(layout, run_dir), Path(data)
    sets = DataConfig(path=folder / "text", valid={"all": folder / "text-valid", "part": folder / "text-more"})
    train = run.train.model_copy(update={"valid_lengths": LENGTHS, "valid_samples": SAMPLES})
    return run.model_copy(update={"data": sets, "train": train})


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
    for name, sizes in (("text", [60]), ("text-valid", [90, 1, 47, 41]), ("text-more", [40] * 9)):
        write_dataset(folder / name, [[generator.integers(2, 64, size).tolist() for size in sizes]], vocab_size=64)
    return folder


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, data):
    placed = [Placed(1, ONE), *(Placed(2, layout) for layout in selected(request, "layout"))]
    return run_placed(train, placed, tmp_path_factory.mktemp("trained"), data=str(data))


def test_loss_over_answers_is_their_exact_mean(found, data, tmp_path):
    [(losses, *_)] = found[Placed(1, ONE)]
    assert losses[0] == pytest.approx(_expected(data, tmp_path), rel=FP32.loss)


@pytest.mark.parametrize("layout", [*FAST, *slow(SLOW)], ids=str)
def test_loss_over_answers_is_that_of_one_process_in_every_layout(found, layout):
    [(losses, norms, held_out, *_)] = found[Placed(1, ONE)]
    for its_losses, its_norms, its_held_out, *_ in found[Placed(2, layout)]:
        assert its_losses == pytest.approx(losses, rel=FP32.loss)
        assert its_norms == pytest.approx(norms, rel=FP32.norm)
        assert its_held_out == pytest.approx(held_out, rel=FP32.loss)
        if layout.tensor == layout.context == 1:  # the same sums, in another order
            assert its_held_out[0] == held_out[0]


def test_held_out_loss_is_the_mean_over_all_examples_though_they_do_not_fill_the_batches(found, data, tmp_path):
    [(_, _, [at_start, _], *_)] = found[Placed(1, ONE)]
    assert at_start == pytest.approx(_expected(data, tmp_path, "valid", range(NUM_VALID)), rel=FP32.loss)


@pytest.mark.parametrize("layout", [*FAST, *slow(SLOW)], ids=str)
def test_validation_of_text_is_an_evaluation_of_the_checkpoint_in_every_layout(found, data, layout):
    main, other = found[Placed(2, layout)]
    run, weights = _text_run(layout, data, data), main[4]
    model = build_model(run.model, run.train.seed)
    model.load_state_dict(weights)
    assert [each.nats for each in main[3]] == [each.nats for each in other[3]]
    assert len(main[3]) == 2 * len(LENGTHS)
    for result in main[3]:
        dataset = TokenDataset(run.data.valid[result.name])
        eval_model = EvalModel("trained", "run", model.eval(), run.model, "", dataset.rule)
        settings = EvalSettings(max_tokens=SAMPLES * SEQ)
        expected = evaluate_perplexity(eval_model, dataset, result.length_tokens, settings)
        assert (expected.num_tokens_read < dataset.num_tokens) == (result.name == "part")
        assert result.nats == pytest.approx(expected.nats_per_token, rel=FP32.loss)
        assert result.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=FP32.loss)
        by_position = evaluate_documents(eval_model, dataset, result.length_tokens, settings).by_position
        assert np.exp([nats for nats in result.nats_by_position if nats == nats]) == pytest.approx(
            [perplexity for _, perplexity in by_position], rel=10 * FP32.loss
        )


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
