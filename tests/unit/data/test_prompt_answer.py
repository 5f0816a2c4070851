"""Examples as sequences: one each, with a loss over the answer only; and refused inputs."""

import json

import numpy as np
import pytest
import torch

from megatron_bipe.config import DataConfig
from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.blend import Blend, open_blend
from megatron_bipe.data.collate import label_weight, make_batch
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection.resegment import resegment
from megatron_bipe.data.manifest import Manifest, PromptAnswerRecord
from megatron_bipe.data.prompt_answer import PromptAnswerDataset, open_dataset, open_text
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.errors import ConfigError, DataError
from megatron_bipe.estimate.dry_run import describe
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.hardware import Choices, CompileChoice, PrecisionChoice
from megatron_bipe.train.batch_loader import BatchLoader
from tests.helpers.errors import raises

SEQ = 8
MADE_FOR = PromptAnswerRecord(task="sums", seq_len_tokens=SEQ)
FIRST = [[1, 7, 5], [8, 2], [1], [5, 9, 9, 9, 9, 9, 2]]  # the second example fills a sequence
SECOND = [[1, 5, 6, 7, 8, 9], [2]]


@pytest.fixture
def folder(tmp_path, write_dataset):
    write_dataset(tmp_path / "sums", [FIRST, SECOND], examples=MADE_FOR)
    return tmp_path / "sums"


def test_sequences_are_the_examples_padded_after_the_answer(folder):
    dataset = open_dataset(folder)
    assert isinstance(dataset, PromptAnswerDataset)
    assert dataset.num_sequences(SEQ) == dataset.num_examples == 3
    tokens, ends = dataset.sequences(np.array([2, 0, 1]), SEQ)
    assert tokens.tolist() == [
        [1, 5, 6, 7, 8, 9, 2, 0, 0],
        [1, 7, 5, 8, 2, 0, 0, 0, 0],
        [1, 5, 9, 9, 9, 9, 9, 2, 0],
    ]
    assert [np.flatnonzero(row).tolist() for row in ends] == [[1], [2], [1]]
    assert dataset.answers(np.array([2, 0, 1])).tolist() == [[5, 6], [2, 4], [0, 7]]
    assert dataset.sequences(np.zeros(0, np.int64), SEQ)[0].shape == (0, SEQ + 1)
    with pytest.raises(IndexError, match=r"3.*3.*3"):
        dataset.sequences(np.array([3]), SEQ)
    with pytest.raises(IndexError, match=r"-1.*0.*3"):
        dataset.answers(np.array([0, -1]))


def test_batch_weighs_the_answers_so_that_the_mean_over_all_labels_is_the_mean_over_them(folder):
    dataset, chosen = open_dataset(folder), np.array([2, 0, 1])
    weight = label_weight(dataset, chosen, SEQ)
    assert weight == pytest.approx(3 * SEQ / (1 + 2 + 7))
    batch = make_batch(dataset, chosen, SEQ, 1023, weight)
    assert batch.weights_BT is not None and batch.weights_BT.dtype == torch.float32
    for row, answer in enumerate(([2], [8, 2], [5, 9, 9, 9, 9, 9, 2])):
        assert batch.labels_BT[row][batch.weights_BT[row] > 0].tolist() == answer
    losses = torch.rand(3, SEQ, generator=torch.Generator().manual_seed(0))
    expected = losses[batch.weights_BT > 0].mean()
    assert torch.allclose((losses * batch.weights_BT).mean(), expected, rtol=1e-6)
    assert batch.intra_BT[1].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]  # padding opens no segment
    assert batch.inter_BT[1].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_fixed_segments_count_from_the_start_of_the_sequence(tmp_path, write_dataset):
    rule = SegmentRule(spec="fixed:3", token_ids=())
    write_dataset(tmp_path, [FIRST], rule=rule, examples=MADE_FOR)
    _, ends = open_dataset(tmp_path).sequences(np.array([0]), SEQ)
    assert np.flatnonzero(ends[0]).tolist() == [2, 5]


def test_text_has_no_weights_and_the_same_record_as_before_examples_existed(tmp_path, write_dataset):
    manifest = write_dataset(tmp_path / "text", [FIRST, SECOND])
    examples = write_dataset(tmp_path / "examples", [FIRST, SECOND], examples=MADE_FOR)
    assert manifest.fingerprint != examples.fingerprint
    assert "examples" not in json.loads((tmp_path / "text" / "manifest.json").read_text())
    assert Manifest.load(tmp_path / "examples").examples == MADE_FOR
    dataset = open_dataset(tmp_path / "text")
    assert type(dataset) is TokenDataset
    assert label_weight(dataset, np.arange(2), 4) == 1.0
    assert make_batch(dataset, np.arange(2), 4, 7).weights_BT is None
    with raises(DataError, location=tmp_path / "text", remedy="tools/prepare_task.py"):
        PromptAnswerDataset(tmp_path / "text")


def test_examples_under_another_segment_rule_stay_examples(tmp_path, write_text_dataset):
    made = write_text_dataset(tmp_path / "text", [["what ", "this.\n", "why ", "so.\n"]])
    made.model_copy(update={"examples": MADE_FOR}).save(tmp_path / "text")
    resegment(tmp_path / "text", "sentence", tmp_path / "again")
    again = open_dataset(tmp_path / "again")
    assert isinstance(again, PromptAnswerDataset) and again.num_examples == 2
    assert again.rule.spec == "sentence"


def test_blend_of_examples_has_the_sequences_and_answers_of_each(tmp_path, write_dataset, folder):
    write_dataset(tmp_path / "more", [SECOND * 40], examples=MADE_FOR)
    paths = {str(folder): 1, str(tmp_path / "more"): 1}
    blend = open_blend(DataConfig(path=paths), SEQ, seed=3)
    chosen = np.array([42, 0, 3, 2])
    tokens, _ = blend.sequences(chosen, SEQ)
    assert tokens[:, 1].tolist() == [5, 7, 5, 5]
    assert blend.answers(chosen).tolist() == [[5, 6], [2, 4], [5, 6], [5, 6]]
    assert blend.num_sequences == 43


def test_blend_of_text_and_examples_is_refused(tmp_path, write_dataset, folder):
    write_dataset(tmp_path / "text", [FIRST])
    with raises(DataError, folder, "examples", tmp_path / "text", location="data.path"):
        Blend([open_dataset(folder), open_dataset(tmp_path / "text")], None, SEQ, 0)


@pytest.mark.parametrize(
    ("documents", "observed"),
    [
        ([[1, 2], [3], [4]], [3]),
        ([[1, 2], [3], [4], []], ["answer", 1]),
        ([[], [3]], ["prompt", 0]),
    ],
)
def test_documents_that_are_not_examples_are_damage(tmp_path, write_dataset, documents, observed):
    write_dataset(tmp_path, [documents], examples=MADE_FOR)
    with raises(DataError, *observed, location="part-00000.idx"):
        open_dataset(tmp_path).sequences(np.array([0]), SEQ)


def test_dataset_without_examples_is_refused(tmp_path, write_dataset):
    write_dataset(tmp_path, [[]], examples=MADE_FOR)
    with raises(DataError, "no examples", location=tmp_path):
        open_dataset(tmp_path).num_sequences(SEQ)


def test_examples_where_text_is_wanted_are_refused(tmp_path, write_dataset, folder):
    with raises(DataError, "sums", location=folder, remedy="tools/preprocess.py"):
        open_text(folder)
    write_dataset(tmp_path / "text", [[[1, 2, 3]]])
    assert open_text(tmp_path / "text").num_tokens == 3


def _run(folder, seq_len_tokens=SEQ):
    return load_run_config(
        None,
        [
            f"data.path={folder}",
            f"train={{seq_len_tokens: {seq_len_tokens}, global_batch: 8, micro_batch: 2, steps: 3}}",
            "optimizer.warmup_steps=0",
            "model={vocab_size: 100, intra_size: 4}",  # the embedding may be shorter than a sequence
        ],
    )


def _mesh(rank=0, num_ranks=1):
    return Mesh(rank, rank, num_ranks, num_ranks, torch.device("cpu"))


def test_batch_loader_examples_of_another_sequence_length_are_refused(folder):
    BatchLoader(_run(folder), _mesh())
    for other in (SEQ - 1, SEQ + 1):
        with raises(
            ConfigError,
            f"train.seq_len_tokens={other}",
            SEQ,
            f"tools/prepare_task.py --length {other}",
            location=folder,
        ):
            BatchLoader(_run(folder, other), _mesh())


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_batch_loader_weights_of_a_step_give_the_mean_over_its_answers_for_any_ranks(folder, num_ranks):
    loaders = [BatchLoader(_run(folder), _mesh(rank, num_ranks)) for rank in range(num_ranks)]
    for step in range(3):
        batches = [batch for loader in loaders for batch in loader.train_batches(8 * step)]
        weights = torch.cat([batch.weights_BT for batch in batches])
        answers = loaders[0]._blend.answers(loaders[0].sequences(8 * step))
        assert weights.mean() == pytest.approx(1, rel=1e-6)
        assert int((weights > 0).sum()) == int(np.diff(answers).sum())


def test_batch_loader_validation_on_examples_weights_answers_over_all_sequences(tmp_path, write_dataset, folder):
    write_dataset(tmp_path / "held-out", [[*FIRST, *SECOND, *FIRST[:2]]], examples=MADE_FOR)
    run = _run(folder)
    data = run.data.model_copy(update={"valid_path": tmp_path / "held-out"})
    loader = BatchLoader(run.model_copy(update={"data": data}), _mesh())
    weights = torch.cat([batch.weights_BT for batch in loader.valid_batches(*loader.validations)])
    assert weights.shape == (4, SEQ)
    assert weights.mean() == pytest.approx(1, rel=1e-6)


def test_dry_run_counts_examples(folder):
    precision = PrecisionChoice("fp32", "train.precision=fp32")
    run = _run(folder)
    run = run.model_copy(update={"train": run.train.model_copy(update={"precision": precision.precision})})
    described = describe(run, {"zero_optimization": {"stage": 1}}, 1, Choices(precision, CompileChoice(False, "off")))
    assert "3 examples of sums" in described and "reads it 8.00 times" in described
