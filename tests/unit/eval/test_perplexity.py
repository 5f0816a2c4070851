"""Perplexity against loops written out by hand."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.eval import sequences as windows_module
from megatron_bipe.eval.perplexity import HEAD_TOKENS, EvalSettings, evaluate_documents, evaluate_perplexity
from megatron_bipe.model.attention import CHUNK
from tests.helpers.errors import raises

ENCODINGS = ["rope", "bipe_rope", "alibi", "bipe_alibi"]
FIXED = SegmentRule(spec="fixed:4", token_ids=())


def plain_losses(eval_model, tokens, closes):
    """Losses of one sequence by a plain loop: ids token by token, all logits, log-softmax in float64."""
    intra, inter, position, segment = [], [], 0, 0
    for number, token in enumerate(tokens):
        intra.append(min(position, eval_model.config.intra_size - 1))
        inter.append(segment)
        position += 1
        if closes(number, token):
            position, segment = 0, segment + 1
    with torch.no_grad():
        logits = eval_model.model(tuple(torch.tensor([ids]) for ids in (tokens, intra, inter)))[0]
    return [-logits[i].double().log_softmax(-1)[label].item() for i, label in enumerate(tokens[1:])]


def closing(rule):
    if rule is FIXED:
        return lambda number, token: number % 4 == 3
    return lambda number, token: token == 13


@pytest.mark.parametrize("rule", [None, FIXED], ids=["newline", "fixed"])
@pytest.mark.parametrize("length", [2, 7, 43, 172])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_full_equals_a_plain_loop_over_windows(make_dataset, make_eval_model, documents, encoding, length, rule):
    dataset = make_dataset(documents, **({"rule": rule} if rule else {}))
    eval_model = make_eval_model(encoding)
    corpus = np.concatenate(documents).tolist()
    losses = []
    for start in range(0, len(corpus) - 1, length):
        losses += plain_losses(eval_model, corpus[start : start + length + 1], closing(rule))
    assert len(losses) == len(corpus) - 1

    result = evaluate_perplexity(eval_model, dataset, length, EvalSettings(batch_tokens=64))

    assert result.nats_per_token == pytest.approx(sum(losses) / len(losses), abs=2e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=2e-6)


@pytest.mark.parametrize("length", [2, 7, 20])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_reference_equals_the_authors_loop_over_batches(
    make_dataset, make_eval_model, documents, monkeypatch, encoding, length
):
    monkeypatch.setattr(windows_module, "GROUP_DOCUMENTS", 4)  # two groups of these six documents
    eval_model = make_eval_model(encoding)
    blocks = []
    for group in (documents[:4], documents[4:]):
        joined = np.concatenate(group).tolist()
        kept = len(joined) // length * length - length
        blocks += [joined[start : start + length] for start in range(0, kept, length)]
    repeated = []  # as gathered: a batch's mean once for each of its blocks, the last batch being smaller
    for first in range(0, len(blocks), 8):
        means = [np.mean(plain_losses(eval_model, block, closing(None))) for block in blocks[first : first + 8]]
        repeated += [np.mean(means)] * len(means)

    result = evaluate_perplexity(eval_model, make_dataset(documents), length, EvalSettings(protocol="reference"))

    assert result.perplexity == pytest.approx(math.exp(np.mean(repeated)), rel=2e-6)
    assert (result.num_sequences, result.num_predictions) == (len(blocks), len(blocks) * (length - 1))
    assert result.num_tokens_dropped == 173 - len(blocks) * length == 173 - result.num_tokens_read


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("length", [2, 7, 60])
def test_sliding_equals_a_plain_loop(make_dataset, make_eval_model, documents, encoding, length):
    eval_model, corpus, stride = make_eval_model(encoding), np.concatenate(documents).tolist(), length // 2
    losses, start = [], 0
    while len(losses) < len(corpus) - 1:
        sequence = plain_losses(eval_model, corpus[start : start + length + 1], closing(None))
        losses += [float(loss) for loss in sequence[len(losses) - start :]]
        start += stride
    result = evaluate_perplexity(eval_model, make_dataset(documents), length, EvalSettings(protocol="sliding"))
    assert result.nats_per_token == pytest.approx(np.mean(losses), abs=2e-6)
    assert (result.num_predictions, result.num_tokens_read, result.num_tokens_dropped) == (172, 173, 0)


def test_reference_feeds_whole_blocks_to_length_dependent_scaling(make_dataset, make_eval_model, documents):
    scaling = {"type": "dynamic", "factor": 4.0}
    eval_model = make_eval_model("rope", rope_scaling=scaling, train_len_tokens=19)
    corpus = np.concatenate(documents).tolist()
    blocks = [corpus[start : start + 20] for start in range(0, 173 // 20 * 20 - 20, 20)]
    wanted = np.mean([plain_losses(eval_model, block, closing(None)) for block in blocks])
    result = evaluate_perplexity(eval_model, make_dataset(documents), 20, EvalSettings(protocol="reference"))
    assert result.nats_per_token == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_full_does_not_depend_on_the_batch_size(make_dataset, make_eval_model, documents, encoding):
    dataset, eval_model = make_dataset(documents), make_eval_model(encoding)
    nats = [
        evaluate_perplexity(eval_model, dataset, 9, EvalSettings(batch_tokens=n)).nats_per_token for n in (1, 50, 10**6)
    ]
    assert max(nats) - min(nats) < 1e-6  # measured: at most 6e-9


def test_full_predicts_the_same_targets_at_every_length(make_dataset, make_eval_model, documents):
    dataset, eval_model = make_dataset(documents), make_eval_model()
    results = [evaluate_perplexity(eval_model, dataset, length, EvalSettings()) for length in (2, 10, 50, 172)]
    assert {result.num_predictions for result in results} == {172}
    assert {(result.num_tokens_read, result.num_tokens_dropped) for result in results} == {(173, 0)}


@pytest.mark.parametrize("protocol", ["full", "sliding", "reference"])
@pytest.mark.parametrize(("limit", "chosen"), [(160, [0, 2, 4, 5]), (159, [0, 2, 5]), (60, [0, 5]), (40, [0])])
def test_max_tokens_equals_a_dataset_of_some_whole_documents(
    make_dataset, make_eval_model, documents, protocol, limit, chosen
):
    eval_model, some = make_eval_model(), make_dataset([documents[n] for n in chosen], name="some")
    settings = EvalSettings(protocol=protocol, max_tokens=limit)
    limited = evaluate_perplexity(eval_model, make_dataset(documents), 9, settings)
    whole = evaluate_perplexity(eval_model, some, 9, EvalSettings(protocol=protocol))
    assert limited[1:3] == whole[1:3]
    assert limited[4:8] == whole[4:8]
    assert limited.bits_per_byte == pytest.approx(whole.bits_per_byte)  # each token has 3 bytes
    by_document = evaluate_documents(eval_model, make_dataset(documents), 9, settings)
    assert by_document.perplexity == evaluate_documents(eval_model, some, 9, EvalSettings(protocol=protocol)).perplexity


def test_max_tokens_beyond_the_dataset_changes_nothing(make_dataset, make_eval_model, documents):
    dataset, eval_model = make_dataset(documents), make_eval_model()
    limited = evaluate_perplexity(eval_model, dataset, 9, EvalSettings(max_tokens=10**9))
    assert limited[:-1] == evaluate_perplexity(eval_model, dataset, 9, EvalSettings())[:-1]


def test_bits_per_byte_is_all_losses_over_the_raw_text(make_dataset, make_eval_model, documents):
    result = evaluate_perplexity(make_eval_model(), make_dataset(documents), 9, EvalSettings())
    assert result.bits_per_byte == pytest.approx(result.nats_per_token * 172 / math.log(2) / (3 * 173))


def test_bits_per_byte_of_a_part_is_over_the_mean_bytes_of_its_tokens(make_dataset, make_eval_model, documents):
    result = evaluate_perplexity(make_eval_model(), make_dataset(documents), 9, EvalSettings(max_tokens=172))
    assert result.num_tokens_read < 173
    total_nats = result.nats_per_token * result.num_predictions
    assert result.bits_per_byte == pytest.approx(total_nats / math.log(2) / (3 * result.num_tokens_read))


def test_bits_per_byte_of_tokens_without_predictions_is_none(make_dataset, make_eval_model, documents):
    settings = EvalSettings(protocol="reference")
    assert evaluate_perplexity(make_eval_model(), make_dataset(documents), 9, settings).bits_per_byte is None


def test_bits_per_byte_of_a_text_of_unknown_length_is_none(make_dataset, make_eval_model, documents):
    dataset = make_dataset(documents)
    shards = tuple(shard.model_copy(update={"text_bytes": None}) for shard in dataset.manifest.shards)
    dataset.manifest = dataset.manifest.model_copy(update={"shards": shards})
    assert evaluate_perplexity(make_eval_model(), dataset, 9, EvalSettings()).bits_per_byte is None


def test_bf16_runs_the_model_in_bf16_and_is_near(make_dataset, make_eval_model, documents):
    dataset = make_dataset(documents)
    exact = evaluate_perplexity(make_eval_model("bipe_alibi"), dataset, 20, EvalSettings())
    eval_model = make_eval_model("bipe_alibi")
    rounded = evaluate_perplexity(eval_model, dataset, 20, EvalSettings(dtype=torch.bfloat16))
    assert next(eval_model.model.parameters()).dtype == torch.bfloat16
    assert 0 < abs(rounded.nats_per_token - exact.nats_per_token) < 0.05


def test_progress_counts_the_tokens_that_the_model_reads(make_dataset, make_eval_model, documents):
    seen = []
    evaluate_perplexity(make_eval_model(), make_dataset(documents), 9, EvalSettings(batch_tokens=30), seen.append)
    assert sum(seen) == 172 and len(seen) == math.ceil(19 / 3) + 1


class _LargestResult(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("encoding", ["bipe_rope", "bipe_alibi"])
def test_long_windows_hold_neither_all_logits_nor_all_scores(make_dataset, make_eval_model, encoding):
    length, vocab_size = 3 * HEAD_TOKENS, 300
    dataset = make_dataset([np.arange(2 * length) % vocab_size], vocab_size=vocab_size)
    eval_model = make_eval_model(encoding, vocab_size=vocab_size, num_layers=1)
    with _LargestResult() as largest:
        evaluate_perplexity(eval_model, dataset, length, EvalSettings())
    mask = CHUNK * length if encoding == "bipe_alibi" else 0  # of the queries that see the same keys
    assert largest.elements == max(HEAD_TOKENS * vocab_size, mask) < length**2 / 10


def test_length_longer_than_the_corpus_names_both(make_dataset, make_eval_model, documents):
    with raises(DataError, "173 tokens", 174, location="corpus", remedy="--lengths"):
        evaluate_perplexity(make_eval_model(), make_dataset(documents), 173, EvalSettings())


@pytest.mark.parametrize(("change", "option"), [({"max_tokens": 0}, "max"), ({"batch_tokens": 0}, "batch")])
def test_impossible_settings_name_the_option(make_dataset, make_eval_model, documents, change, option):
    with raises(ConfigError, 0, location=f"--{option}-tokens"):
        evaluate_perplexity(make_eval_model(), make_dataset(documents), 9, EvalSettings(**change))


def test_damaged_weights_are_reported_not_averaged(make_dataset, make_eval_model, documents):
    eval_model = make_eval_model()
    with torch.no_grad():
        eval_model.model[1].mlp.down.weight[0, 0] = math.nan
    with raises(CheckpointError, "nan", 9, location="runs/tiny", remedy="--dtype"):
        evaluate_perplexity(eval_model, make_dataset(documents), 9, EvalSettings())


def test_damaged_tokens_are_reported_not_looked_up(make_dataset, make_eval_model, documents):
    dataset = make_dataset(documents)
    file = dataset.path / "part-00001.bin"
    content = bytearray(file.read_bytes())
    content[20:22] = (1000).to_bytes(2, "little")
    file.write_bytes(content)
    with raises(DataError, "vocabulary", 40, location=dataset.path, remedy="tools/inspect_data.py verify"):
        evaluate_perplexity(make_eval_model(), dataset, 9, EvalSettings())
