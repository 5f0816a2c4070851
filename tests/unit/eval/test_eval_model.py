"""Datasets that a model may be evaluated on."""

import logging

import pytest

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.errors import CheckpointError, DataError
from megatron_bipe.eval.eval_model import check_compatible, load_eval_models
from tests.helpers.datasets import write_letters
from tests.helpers.errors import assert_warned, raises

SENTENCE = SegmentRule(spec="sentence", token_ids=(13, 29))


@pytest.mark.parametrize("encoding", ["rope", "bipe_rope"])
def test_check_suits_own_data_passes_without_a_warning(make_dataset, make_eval_model, documents, encoding, caplog):
    check_compatible(make_eval_model(encoding), make_dataset(documents))
    assert not caplog.records


@pytest.mark.parametrize("encoding", ["rope", "bipe_rope"])
def test_check_suits_other_tokenizer_names_both_fingerprints(make_dataset, make_eval_model, documents, encoding):
    with raises(DataError, "b" * 64, "a" * 64, location="runs/tiny"):
        check_compatible(make_eval_model(encoding), make_dataset(documents, fingerprint="b" * 64))


def test_check_suits_data_made_with_the_tokenizer_of_the_export(make_dataset, make_eval_model, documents, tmp_path):
    tokenizer = write_letters(tmp_path / "export", {})
    made = make_dataset(documents, fingerprint=tokenizer.fingerprint)
    check_compatible(make_eval_model()._replace(source=str(tmp_path / "export")), made)
    with raises(DataError, tokenizer.fingerprint):
        check_compatible(make_eval_model()._replace(source=str(tmp_path)), made)


def test_check_suits_larger_vocabulary_names_both_sizes(make_dataset, make_eval_model, documents):
    with raises(CheckpointError, 40, 41, "corpus", location="runs/tiny"):
        check_compatible(make_eval_model(), make_dataset(documents, vocab_size=41))


def test_check_suits_padded_token_table_passes(make_dataset, make_eval_model, documents):
    check_compatible(make_eval_model(vocab_size=64), make_dataset(documents))


@pytest.mark.parametrize("rule", [SENTENCE, SegmentRule(spec="fixed:8", token_ids=())])
def test_check_suits_other_rule_names_both(make_dataset, make_eval_model, documents, rule):
    observed, remedy = (f"'{rule.spec}'", "'newline'", 13), "--segments 'newline'"
    with raises(DataError, *observed, location="runs/tiny", remedy=remedy):
        check_compatible(make_eval_model("bipe_alibi"), make_dataset(documents, rule=rule))


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_check_suits_model_without_segments_takes_any_rule(make_dataset, make_eval_model, documents, encoding):
    check_compatible(make_eval_model(encoding), make_dataset(documents, rule=SENTENCE))


def test_check_suits_same_ids_under_another_name_pass(make_dataset, make_eval_model, documents):
    check_compatible(make_eval_model(rule=SegmentRule(spec="[13]", token_ids=(13,))), make_dataset(documents))


def test_check_suits_unrecorded_training_data_is_warned_about(make_dataset, make_eval_model, documents, caplog):
    with caplog.at_level(logging.WARNING):
        check_compatible(make_eval_model(rule=None, fingerprint=None), make_dataset(documents))
    assert_warned(caplog, "tokenizer")
    assert_warned(caplog, "segment rule")


@pytest.mark.parametrize("recorded", [True, False, None])
@pytest.mark.parametrize("of_data", [True, False, None])
def test_evaluation_of_other_ids_of_special_tokens_in_text_is_refused(
    make_dataset, make_eval_model, write_dataset, documents, save_run, recorded, of_data
):
    trained = make_dataset(documents)
    for dataset, special_in_text in ((trained, recorded), (other := trained.path.with_name("other"), of_data)):
        folder = getattr(dataset, "path", dataset)
        known = {"tokenizer": trained.manifest.tokenizer, "rule": trained.rule, "vocab_size": 40}
        write_dataset(folder, [documents], special_in_text=special_in_text, **known)
    run_dir = save_run(make_eval_model(), TokenDataset(trained.path))
    if None in (recorded, of_data) or recorded == of_data:
        [eval_model] = load_eval_models([str(run_dir)], [TokenDataset(other)], [16])
        assert eval_model.special_in_text is recorded
    else:
        with raises(DataError, other, location=f"{run_dir}@10", remedy="--special-in-text"):
            load_eval_models([str(run_dir)], [TokenDataset(other)], [16])
