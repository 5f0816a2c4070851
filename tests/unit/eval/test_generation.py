"""Batched greedy generation against the training model, one token at a time and without a cache."""

import json

import numpy as np
import pytest
import torch

from megatron_bipe.data.segments import bilevel_ids, resolve_rule, segment_ends
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.eval.generation import Limits, batches, generate_batches, load_generator
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.hf_config import DataFields
from megatron_bipe.hf.tokenizer_files import TokenizerSource
from tests.helpers.errors import raises

NEW = 12


@pytest.fixture(params=["bipe_rope", "bipe_alibi", "rope"])
def exported(request, tmp_path, letters, make_eval_model):
    """An exported model of letters, and the training model it came from."""
    rule = resolve_rule('["c"]', letters)
    eval_model = make_eval_model(
        request.param, rule=rule, vocab_size=letters.vocab_size, train_len_tokens=32, init_std=0.5
    )
    source = TokenizerSource(letters.definition, letters.to_json(), letters.special_ids, letters.encode_batch)
    fields = DataFields(rule.spec, rule.token_ids, letters.fingerprint, letters.special_ids)
    sequences = _ids(np.arange(260, 280), rule, eval_model.config)
    options = ExportOptions(dtype=torch.float32)
    export_model(
        eval_model.model.state_dict(),
        eval_model.config,
        tmp_path / "model",
        fields,
        sequences,
        source,
        options,
    )
    return tmp_path / "model", eval_model


def _ids(tokens, rule, config):
    arrays = (tokens[None], *bilevel_ids(segment_ends(tokens, rule)[None], config.intra_size - 1))
    return tuple(torch.from_numpy(np.asarray(array, dtype=np.int64)) for array in arrays)


def _greedy(eval_model, prompt):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            tokens.append(
                int(eval_model.model(_ids(np.array(tokens), eval_model.rule, eval_model.config))[0, -1].argmax())
            )
    return tokens[len(prompt) :]


def test_generation_in_batches_is_the_training_models_choice_token_by_token(exported, letters):
    folder, eval_model = exported
    generator = load_generator(folder, "cpu", torch.float32)
    assert generator.max_seq_len_tokens == eval_model.config.max_seq_len_tokens
    texts = ["abc de", "c", "hello world. c and more of it", "x", "the end c"]
    prompts = [np.concatenate([[1], ids]) for ids in letters.encode_batch(texts)]
    done = []
    found = generate_batches(generator, prompts, Limits(NEW, batch_tokens=70), done.append)
    assert sum(done) == 5 and len(done) > 1
    expected = [_greedy(eval_model, prompt) for prompt in prompts]
    for tokens, wanted in zip(found, expected, strict=True):
        assert tokens == (wanted[: wanted.index(2)] if 2 in wanted else wanted)


def test_answer_ends_before_eos(exported, letters):
    generator = load_generator(exported[0], "cpu", torch.float32)
    prompt = np.concatenate([[1], letters.encode_batch(["abc de"])[0]])
    [whole] = generate_batches(generator, [prompt], Limits(NEW))
    stop = whole[5]  # taken for EOS
    generator.tokenizer.special_ids = generator.tokenizer.special_ids | {"eos": stop}
    [cut] = generate_batches(generator, [prompt], Limits(NEW))
    assert cut == whole[: whole.index(stop)]


def test_prompts_that_do_not_fit_the_encoding_are_refused_before_any_is_gone_on_with(exported, letters):
    generator = load_generator(exported[0], "cpu", torch.float32)._replace(max_seq_len_tokens=20)
    prompts = [np.full(length, 5) for length in (3, 9)]
    assert len(generate_batches(generator, prompts, Limits(11))) == 2
    with raises(ConfigError, 9, 12, 20, location=exported[0]):
        generate_batches(generator, prompts, Limits(12))


def test_damaged_weights_are_refused(exported):
    weights = exported[0] / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with raises(CheckpointError, "SHA256SUMS", location=weights):
        load_generator(exported[0], "cpu", torch.float32)


def test_batches_take_the_longest_first_and_stay_below_the_limit():
    lengths = [3, 10, 4, 10, 1, 30]
    made = batches(lengths, Limits(new_tokens=10, batch_tokens=40))
    assert made == [[5], [1, 3], [2, 0], [4]]
    assert batches([100], Limits(10, batch_tokens=1)) == [[0]]
    assert batches([], Limits(10)) == []


def test_models_that_cannot_answer_are_refused(exported, tmp_path):
    folder, _ = exported
    with raises(CheckpointError, "config.json", location=folder / "none"):
        load_generator(folder / "none", "cpu", torch.float32)
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with raises(CheckpointError, "end-of-sequence", location=folder):
        load_generator(folder, "cpu", torch.float32)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</s>"}))
    (folder / "SHA256SUMS").write_text("".join(line for line in sums.splitlines(keepends=True) if "safetens" in line))
    (folder / "model.safetensors").unlink()
    with raises(CheckpointError, "model.safetensors", "No such file", location=folder):
        load_generator(folder, "cpu", torch.float32)
    (folder / "SHA256SUMS").unlink()
    with raises(CheckpointError, "model.safetensors", location=folder, remedy="tools/import_hf.py"):
        load_generator(folder, "cpu", torch.float32)
