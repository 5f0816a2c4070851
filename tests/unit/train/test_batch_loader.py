"""The sequences that a rank reads."""

import numpy as np
import pytest
import torch

from megatron_bipe.config import DataConfig
from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.blend import Blend
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.shuffle import SampleOrder
from megatron_bipe.errors import ConfigError, DataError
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.train.batch_loader import BatchLoader
from tests.helpers.errors import raises

SEQ, GLOBAL, MICRO = 8, 8, 2


def _mesh(rank=0, num_ranks=1):
    return Mesh(rank, rank, num_ranks, num_ranks, torch.device("cpu"))


@pytest.fixture
def run(tmp_path, write_dataset):
    generator = np.random.default_rng(0)
    for name in ("train", "valid"):
        write_dataset(tmp_path / name, [[generator.integers(2, 100, 90).tolist() for _ in range(4)] for _ in range(2)])
    return load_run_config(
        None,
        [
            f"data.path={tmp_path / 'train'}",
            f"data.valid_path={tmp_path / 'valid'}",
            f"train.seq_len_tokens={SEQ}",
            f"train.global_batch={GLOBAL}",
            f"train.micro_batch={MICRO}",
            "train.valid_samples=21",
            "model.vocab_size=100",
        ],
    )


def _tokens(batches):
    return [batch.tokens_BT for batch in batches]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_train_batches_hold_the_samples_of_the_step_whatever_the_ranks(run, num_ranks):
    dataset = TokenDataset(run.data.path)
    order = SampleOrder(dataset.num_sequences(SEQ), run.train.seed)
    for step in (0, 3, 40):  # step 40 is epochs later
        loaders = [BatchLoader(run, _mesh(rank, num_ranks)) for rank in range(num_ranks)]
        per_rank = [_tokens(loader.train_batches(step * GLOBAL)) for loader in loaders]
        assert all(len(batches) == GLOBAL // MICRO // num_ranks for batches in per_rank)
        read = torch.cat([batches[micro] for micro in range(len(per_rank[0])) for batches in per_rank])
        expected = dataset.sequences(order.sequence_indices(step * GLOBAL, GLOBAL), SEQ)[0][:, :-1]
        assert np.array_equal(read.numpy(), expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_train_batches_of_a_blend_hold_the_samples_of_the_step_whatever_the_ranks(run, write_dataset, num_ranks):
    second = run.data.path.with_name("second")
    write_dataset(second, [[list(range(2, 100))]])
    data = DataConfig(path={str(run.data.path): 1, str(second): 3}, valid_path=run.data.valid_path)
    blended = run.model_copy(update={"data": data})
    blend = Blend([TokenDataset(run.data.path), TokenDataset(second)], [1, 3], SEQ, run.train.seed)
    for step in (0, 3, 1249, 1250):  # step 1250 starts the second pattern
        loaders = [BatchLoader(blended, _mesh(rank, num_ranks)) for rank in range(num_ranks)]
        per_rank = [_tokens(loader.train_batches(step * GLOBAL)) for loader in loaders]
        read = torch.cat([batches[micro] for micro in range(len(per_rank[0])) for batches in per_rank])
        expected = blend.sequences(blend.sequence_indices(step * GLOBAL, GLOBAL), SEQ)[0][:, :-1]
        assert np.array_equal(read.numpy(), expected)
    assert loaders[0].record == blend.record
    assert loaders[0].dataset.path == run.data.path


def test_batch_loader_blend_with_a_dataset_of_another_rule_than_the_run_is_refused(run):
    path = {str(run.data.path): 1, str(run.data.valid_path): 1}
    data = DataConfig(path=path, segments="reference")
    with raises(ConfigError, "'reference'", "'[5]'", location=run.data.path):
        BatchLoader(run.model_copy(update={"data": data}), _mesh())


def test_batch_loader_validation_set_shorter_than_a_sequence_is_refused(run, write_dataset):
    write_dataset(run.data.valid_path, [[[1] * SEQ]])
    with raises(DataError, SEQ, SEQ + 1, location=run.data.valid_path, remedy="train.seq_len_tokens"):
        BatchLoader(run, _mesh())


def test_batch_loader_missing_data_names_the_command_that_makes_it(run, tmp_path):
    absent = run.model_copy(update={"data": run.data.model_copy(update={"path": tmp_path / "absent"})})
    with raises(DataError, location=tmp_path / "absent", remedy="tools/preprocess.py"):
        BatchLoader(absent, _mesh())


def test_batch_loader_sequence_longer_than_the_corpus_is_refused(run):
    long = run.model_copy(update={"train": run.train.model_copy(update={"seq_len_tokens": 1000})})
    with raises(DataError, 720, 1000, 1001, location=run.data.path, remedy="train.seq_len_tokens"):
        BatchLoader(long, _mesh())


def test_batch_loader_validation_set_of_another_tokenizer_is_refused(run, write_dataset):
    other = TokenizerRecord(name="other", fingerprint="b" * 64, vocab_size=100, special_ids={})
    write_dataset(run.data.valid_path, [[[1] * 90]], tokenizer=other)
    with raises(DataError, run.data.valid_path, "b" * 64, "a" * 64, location="data.path"):
        BatchLoader(run, _mesh())


def test_batch_loader_validation_set_with_other_ids_of_special_tokens_in_text_is_refused(run, write_dataset):
    documents = [[list(range(2, 100))]]
    write_dataset(run.data.path, documents, special_in_text=True)
    BatchLoader(run, _mesh())  # the validation set does not record it
    write_dataset(run.data.valid_path, documents, special_in_text=False)
    with raises(DataError, run.data.valid_path, location="data.path", remedy="--special-in-text"):
        BatchLoader(run, _mesh())


def test_batch_loader_validation_set_of_another_rule_is_refused_if_segments_matter(run, write_dataset):
    other = SegmentRule(spec="fixed:3", token_ids=())
    write_dataset(run.data.valid_path, [[[1] * 90]], rule=other)
    observed = run.data.valid_path, "'fixed:3'", "'[5]'"
    with raises(DataError, *observed, location="data.path", remedy="--segments '[5]'"):
        BatchLoader(run, _mesh())
    BatchLoader(run.model_copy(update={"model": run.model.model_copy(update={"encoding": "rope"})}), _mesh())


def test_batch_loader_clips_intra_ids_only_for_a_learned_embedding(run):
    model = run.model.model_copy(update={"intra_size": 8})
    short = run.model_copy(update={"model": model})
    sines = run.model_copy(update={"model": model.model_copy(update={"intra_encoding": "sinusoidal", "intra_size": 2})})
    learned, positions = (next(iter(BatchLoader(each, _mesh()).train_batches(0))).intra_BT for each in (short, sines))
    assert learned.max() <= 7 and positions.max() >= 2 and torch.equal(learned, positions.clamp(max=7))


def test_batch_loader_dataset_with_more_ids_than_the_model_is_refused(run):
    small = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": 99})})
    with raises(ConfigError, "model.vocab_size=99", "100 ids", location=run.data.path):
        BatchLoader(small, _mesh())
