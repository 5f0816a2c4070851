"""Validations read the text that an evaluation reads, at every length and on any number of ranks, with its results."""

import numpy as np
import pytest
import torch

from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import PromptAnswerRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.engine.base import loss_sums, position_parts
from megatron_bipe.engine.interface import LossSums
from megatron_bipe.errors import ConfigError, DataError
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.perplexity import EvalSettings, evaluate_documents, evaluate_perplexity
from megatron_bipe.eval.sequences import select_text
from megatron_bipe.model import build_model, token_losses
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.train.batch_loader import BatchLoader
from megatron_bipe.train.validation import main_result
from tests.helpers.errors import raises

SEQ, MICRO, SAMPLES = 16, 4, 20
SETS = ("few", "many")
LENGTHS = (5, SEQ, 40, 100)
FIXED = SegmentRule(spec="fixed:3", token_ids=())


@pytest.fixture
def make_run(tmp_path, write_dataset):
    """Return a function that configures a run with two validation sets: one is read in full, the other in part."""
    generator = np.random.default_rng(0)
    sizes = {"train": [90], "few": [70, 1, 50, 33], "many": [60, 130, 20, 90, 200, 45, 77]}

    def make(*settings, rule=None, encoding="bipe_rope"):
        for name, lengths in sizes.items():
            documents = [generator.integers(2, 100, size).tolist() for size in lengths]
            write_dataset(tmp_path / name, [documents[:2], documents[2:]], **({"rule": rule} if rule else {}))
        base = [
            f"data={{path: {tmp_path / 'train'}, valid: {{few: {tmp_path / 'few'}, many: {tmp_path / 'many'}}}}}",
            f"model={{num_layers: 2, hidden_size: 32, num_heads: 4, ffn_size: 48, vocab_size: 100, intra_size: {SEQ}, "
            f"init_std: 0.2, train_len_tokens: {SEQ}, encoding: {encoding}}}",
            f"train={{seq_len_tokens: {SEQ}, global_batch: 8, micro_batch: {MICRO}, valid_samples: {SAMPLES}, "
            f"valid_lengths: {list(LENGTHS)}}}",
        ]
        return load_run_config(None, [*base, *settings])

    return make


def loaders(run, num_ranks):
    return [BatchLoader(run, Mesh(rank, rank, num_ranks, num_ranks, torch.device("cpu"))) for rank in range(num_ranks)]


def results(run, model, num_ranks):
    """Return the results of all validations, from sums of the losses of every rank's batches."""
    ranks, found = loaders(run, num_ranks), []
    for validation in ranks[0].validations:
        total_Q2 = torch.zeros(16, 2, dtype=torch.float64)
        for loader in ranks:
            for tokens, intra, inter, labels, weights in loader.valid_batches(validation):
                with torch.no_grad():
                    losses = token_losses(model((tokens, intra, inter)), labels)
                total_Q2 += loss_sums(losses, weights, position_parts(labels))
        found.append(validation.result(LossSums(*total_Q2.T.tolist())))
    return found


@pytest.mark.parametrize(
    ("encoding", "rule"), [("bipe_rope", None), ("bipe_alibi", FIXED), ("rope", None), ("randomized_rope", None)]
)
def test_validation_has_the_results_of_the_evaluation_of_the_same_weights(make_run, encoding, rule):
    lengths = [each for each in LENGTHS if encoding != "randomized_rope" or each <= 4 * SEQ]
    run = make_run(f"train.valid_lengths={lengths}", rule=rule, encoding=encoding)
    model = build_model(run.model, seed=3).eval()
    found = results(run, model, 1)
    assert [each[:2] for each in found] == [(name, length) for name in SETS for length in lengths]
    for each in found:
        if encoding == "randomized_rope" and each.length_tokens > SEQ:
            continue  # its positions depend on the length of the batch, and the last sequence is padded
        dataset = TokenDataset(run.data.valid[each.name])
        eval_model = EvalModel("tiny", "runs/tiny", model, run.model, "a" * 64, dataset.rule)
        settings = EvalSettings(max_tokens=SAMPLES * SEQ)
        expected = evaluate_perplexity(eval_model, dataset, each.length_tokens, settings)
        assert (expected.num_tokens_read < dataset.num_tokens) == (each.name == "many")
        assert each.nats == pytest.approx(expected.nats_per_token, rel=1e-6)
        assert each.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
        assert each.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)
        by_position = evaluate_documents(eval_model, dataset, each.length_tokens, settings).by_position
        shown = [nats for nats in each.nats_by_position if nats == nats]
        assert len(each.nats_by_position) == 16 and len(shown) == min(16, each.length_tokens)
        assert np.exp(shown) == pytest.approx([perplexity for _, perplexity in by_position], rel=1e-5)


def test_validation_results_do_not_depend_on_the_number_of_ranks(make_run):
    run = make_run()
    model = build_model(run.model, seed=3).eval()
    alone = results(run, model, 1)
    assert len({each.nats for each in alone}) == len(alone)
    for num_ranks in (2, 3, 8):
        for found, expected in zip(results(run, model, num_ranks), alone, strict=True):
            assert found[:2] == expected[:2] and found.nats == pytest.approx(expected.nats, rel=1e-6)
            assert found.nats_by_position == pytest.approx(expected.nats_by_position, rel=1e-6, nan_ok=True)
            assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)


@pytest.mark.parametrize("samples", [8, 20, 24, 10_000])
@pytest.mark.parametrize("num_ranks", [1, 3, 8, 24])
def test_valid_batches_predict_every_token_of_the_text_once_whatever_the_ranks(make_run, samples, num_ranks):
    run = make_run(f"train.valid_samples={samples}")
    ranks = loaders(run, num_ranks)
    for validation in ranks[0].validations:
        per_rank = [list(loader.valid_batches(validation)) for loader in ranks]
        shapes = [[batch.tokens_BT.shape for batch in batches] for batches in per_rank]
        assert len({tuple(each) for each in shapes}) == 1 and len(set(shapes[0])) == 1  # equal for all ranks
        rows, length = shapes[0][0]
        assert length == validation.length_tokens and rows * length <= max(MICRO * SEQ, length)
        labels, weights = (torch.cat([batch[field] for batches in per_rank for batch in batches]) for field in (3, 4))
        text = select_text(TokenDataset(run.data.valid[validation.name]), samples * SEQ)
        expected = text.tokens(1, text.num_tokens).astype(np.int64)
        assert np.array_equal(labels[weights > 0].numpy(), expected)
        assert set(weights.unique().tolist()) <= {0.0, 1.0}


def test_valid_batches_are_those_of_one_set_of_the_old_name(make_run):
    run = make_run()
    data = run.data.model_copy(update={"valid": {}, "valid_path": run.data.valid["many"]})
    [loader] = loaders(run.model_copy(update={"data": data}), 1)
    assert [(each.name, each.length_tokens) for each in loader.validations] == [("valid", each) for each in LENGTHS]
    train = run.train.model_copy(update={"valid_lengths": ()})
    [loader] = loaders(run.model_copy(update={"train": train}), 1)
    assert [(each.name, each.length_tokens) for each in loader.validations] == [("few", SEQ), ("many", SEQ)]


def test_run_without_validation_sets_has_no_validations(make_run):
    [loader] = loaders(make_run("data.valid={}"), 1)
    assert loader.validations == [] and not loader.has_valid


def test_sums_of_a_loss_that_is_not_finite_stay_in_their_part():
    losses = torch.ones(2, 32)
    losses[1, 5] = torch.inf
    weights = torch.full((2, 32), 0.5)
    weights[:, 6:8] = 0
    sums = LossSums(*loss_sums(losses, weights, position_parts(losses)).T.tolist())
    assert sums.nats_by_position[:5] == pytest.approx([1.0, 1.0, torch.inf, torch.nan, 1.0], nan_ok=True)
    assert sums.mean_nats == torch.inf


def test_result_that_stands_for_all_is_of_the_first_set_at_the_training_length(make_run):
    run = make_run()
    found = results(run, build_model(run.model, seed=3).eval(), 1)
    assert main_result(found, SEQ)[:2] == ("few", SEQ)
    assert main_result(found, 17)[:2] == ("few", LENGTHS[0])


def test_validation_set_shorter_than_the_longest_sequence_is_refused(make_run):
    run = make_run("train.valid_lengths=[8, 154]", "train.valid_samples=1000")
    with raises(DataError, 154, 155, location=run.data.valid["few"], remedy="train.valid_lengths"):
        loaders(run, 1)
    run = make_run("train.valid_lengths=[126]")
    with raises(DataError, 622, "train.valid_samples=20", 125, 127, location="many", remedy="train.valid_samples"):
        loaders(run, 1)


def test_problems_of_several_validation_sets_are_listed_together(make_run, write_dataset):
    run = make_run()
    other = TokenizerRecord(name="other", fingerprint="b" * 64, vocab_size=100, special_ids={})
    write_dataset(run.data.valid["few"], [[[1] * 500]], tokenizer=other)
    write_dataset(run.data.valid["many"], [[[1] * 500]], rule=FIXED)
    with raises(ConfigError, 2, "b" * 64, "'fixed:3'", location="data.valid"):
        loaders(run, 1)
    short = make_run("train.valid_lengths=[1000]")
    with raises(ConfigError, 2, 154, 622, location="data.valid"):
        loaders(short, 1)


def test_lengths_for_prompts_and_answers_are_refused(make_run, write_dataset):
    run = make_run()
    record = PromptAnswerRecord(task="noise", seq_len_tokens=SEQ)
    for folder in (run.data.path, *run.data.valid.values()):
        write_dataset(folder, [[[3, 4], [6]] * 9], examples=record)
    with raises(ConfigError, str(list(LENGTHS)), location="data.valid", remedy=""):
        loaders(run, 1)
    train = run.train.model_copy(update={"valid_lengths": ()})
    [loader] = loaders(run.model_copy(update={"train": train}), 1)
    assert [(each.name, each.length_tokens) for each in loader.validations] == [("few", SEQ), ("many", SEQ)]
    result = loader.validations[0].result(LossSums([0.0] * 15 + [4.0], [0.0] * 15 + [2.0]))
    assert result.nats == result.nats_by_position[15] == 2.0 and result.bits_per_byte is None


def test_tokens_outside_the_vocabulary_of_a_validation_set_are_refused(make_run, write_dataset):
    run = make_run()
    tokenizer = TokenizerRecord(name="test", fingerprint="a" * 64, vocab_size=50, special_ids={})
    write_dataset(run.data.valid["few"], [[[70] * 500]], tokenizer=tokenizer)
    [loader] = loaders(run, 1)
    with raises(DataError, 50, location=run.data.valid["few"], remedy="verify"):
        list(loader.valid_batches(loader.validations[0]))
