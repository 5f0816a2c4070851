"""`tools/evaluate.py perplexity` from the outside: checkpoints and exported models in, files and exit codes out."""

import json
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import save_file

from megatron_bipe.errors import BipeError, CheckpointError, ConfigError, DataError
from megatron_bipe.eval.perplexity import Settings, evaluate_perplexity
from megatron_bipe.hf.weights import to_llama
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.paths import ROOT
from tests.helpers.tools import script


@pytest.fixture
def evaluate():
    """The script as a module."""
    with script("evaluate") as module:
        yield module


@pytest.fixture
def run_command(evaluate, monkeypatch, tmp_path):
    """Runs the command in this process, writing to tmp_path/out; gives its JSON."""

    def run(models, data, *options, lengths="8,16,32"):
        arguments = ["perplexity", "--model", *models, "--data", data, "--lengths", lengths]
        arguments += ["--output", tmp_path / "out", "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return json.loads((tmp_path / "out" / "perplexity.json").read_text())

    return run


@pytest.fixture
def save_run(tmp_path):
    """Maker of a run folder as pretrain.py leaves it; earlier steps have smaller weights."""

    def save(subject, dataset, steps=(5, 10)):
        run_dir = tmp_path / subject.name
        model = {k: v for k, v in subject.config.model_dump(mode="json").items() if v is not None}
        for step in steps:
            weights = {name: weight * (step / steps[-1]) for name, weight in subject.model.state_dict().items()}
            write_checkpoint(run_dir, step, weights)
        (run_dir / "config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"precision": "fp32"}}))
        (run_dir / "data.json").write_text(dataset.manifest.record.model_dump_json())
        return run_dir

    return save


@pytest.fixture
def save_exported(tmp_path):
    """Maker of those parts of an exported folder that loading reads."""

    def save(subject):
        folder, config = tmp_path / subject.name, subject.config
        folder.mkdir()
        settings = {
            "model_type": "bipe",
            "encoding": config.encoding,
            "num_hidden_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "intermediate_size": config.ffn_size,
            "vocab_size": config.vocab_size,
            "intra_size": config.intra_size,
            "train_len_tokens": config.train_len_tokens,
            "rms_norm_eps": config.norm_eps,
            "initializer_range": config.init_std,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "segments": {"spec": subject.rule.spec, "token_ids": list(subject.rule.token_ids)},
            "tokenizer_fingerprint": subject.tokenizer_fingerprint,
        }
        (folder / "config.json").write_text(json.dumps(settings))
        weights = {name: weight.contiguous() for name, weight in to_llama(subject.model.state_dict(), config).items()}
        save_file(weights, folder / "model.safetensors")
        return folder

    return save


def perplexities(report):
    return {model["name"]: [result["perplexity"] for result in model["results"]] for model in report["models"]}


def test_command_checkpoint_and_export_of_one_model_agree(
    run_command, make_dataset, make_subject, documents, save_run, save_exported, capsys
):
    dataset = make_dataset(documents)
    subject = make_subject("bipe_rope", name="run")
    models = [save_run(subject, dataset), save_exported(subject._replace(name="exported"))]

    found = perplexities(run_command(models, dataset.path))

    want = [evaluate_perplexity(subject, dataset, length, Settings()).perplexity for length in (8, 16, 32)]
    assert found == {"run": pytest.approx(want, rel=1e-6), "exported": pytest.approx(want, rel=1e-6)}
    printed = capsys.readouterr().out
    assert f"{want[1]:,.2f}*" in printed and "172 predictions" in printed and "perplexity.png" in printed


def test_command_named_step_is_that_checkpoint(run_command, make_dataset, make_subject, documents, save_run):
    dataset = make_dataset(documents)
    run_dir = save_run(make_subject(name="run"), dataset)
    found = perplexities(run_command([run_dir, f"{run_dir}@5", f"{run_dir}@10"], dataset.path))
    assert found["run"] == found["run step 10"] != found["run step 5"]


def test_command_protocol_and_limit_reach_the_report(run_command, make_dataset, make_subject, documents, save_run):
    dataset = make_dataset(documents)
    run_dir = save_run(make_subject(), dataset)
    report = run_command([run_dir], dataset.path, "--protocol", "reference", "--max-tokens", "100", lengths="16,8")
    assert (report["protocol"], report["max_tokens"]) == ("reference", 100)
    [model] = report["models"]
    assert [(r["length_tokens"], r["num_windows"]) for r in model["results"]] == [(8, 11), (16, 5)]


def test_command_model_that_does_not_encode_the_longest_window_is_named_before_any_is_run(
    run_command, make_dataset, make_subject, documents, save_run, monkeypatch, evaluate
):
    dataset = make_dataset(documents)
    runs = [save_run(make_subject(name), dataset) for name in ("rope", "learned")]
    monkeypatch.setattr(evaluate, "_evaluate", None)
    with pytest.raises(ConfigError, match=r"a window of 64 tokens exceeds the 16 .*learned.*at most 16"):
        run_command(runs, dataset.path, lengths="16,64")


def test_command_existing_output_needs_overwrite(run_command, make_dataset, make_subject, documents, save_run):
    dataset = make_dataset(documents)
    run_dir = save_run(make_subject(), dataset)
    first = run_command([run_dir], dataset.path)
    with pytest.raises(ConfigError, match="--overwrite"):
        run_command([run_dir], dataset.path, lengths="4")
    again = run_command([run_dir], dataset.path, "--overwrite", lengths="8")
    assert perplexities(again)["tiny"] == perplexities(first)["tiny"][:1]


def spoil_nothing(run_dir):
    return run_dir


def spoil_record(run_dir):
    (run_dir / "data.json").write_text('{"rule": 3}')
    return run_dir


def drop_record(run_dir):
    (run_dir / "data.json").unlink()
    return run_dir


@pytest.mark.parametrize(
    ("model_of", "options", "error", "message"),
    [
        (lambda run: run.with_name("absent"), {}, CheckpointError, "no such folder"),
        (lambda run: run.parent, {}, CheckpointError, "neither an exported model"),
        (lambda run: f"{run}@7", {}, CheckpointError, "no checkpoint of step 7.*5, 10"),
        (spoil_record, {}, CheckpointError, "record of the training data cannot be read"),
        (drop_record, {}, CheckpointError, "record of the training data cannot be read.*data.json"),
        (spoil_nothing, {"lengths": "8,two"}, ConfigError, "'two' is no window length"),
        (spoil_nothing, {"lengths": "8,1"}, ConfigError, "'1' is no window length"),
        (spoil_nothing, {"lengths": "8,"}, ConfigError, "'' is no window length"),
        (spoil_nothing, {"lengths": "8,4096"}, DataError, "173 tokens .*4096"),
    ],
)
def test_command_bad_input_is_named_before_anything_is_written(
    run_command, make_dataset, make_subject, documents, save_run, tmp_path, model_of, options, error, message
):
    dataset = make_dataset(documents)
    model = model_of(save_run(make_subject(), dataset))
    with pytest.raises(error, match=message):
        run_command([model], dataset.path, **options)
    assert not list((tmp_path / "out").glob("*"))


def test_command_unknown_device_is_named(run_command, make_dataset, make_subject, documents, save_run):
    dataset = make_dataset(documents)
    with pytest.raises(BipeError, match="device 'abacus'"):
        run_command([save_run(make_subject(), dataset)], dataset.path, "--device", "abacus")


def test_command_wrong_tokenizer_leaves_with_exit_code_2_and_one_message(
    make_dataset, make_subject, documents, save_run, tmp_path
):
    run_dir = save_run(make_subject(), make_dataset(documents))
    other = make_dataset(documents, fingerprint="b" * 64, name="other")
    command = [sys.executable, ROOT / "tools" / "evaluate.py", "perplexity", "--model", run_dir, "--data", other.path]
    done = subprocess.run(
        [*command, "--lengths", "8", "--output", tmp_path / "out"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "a" * 64 in done.stderr and "b" * 64 in done.stderr and "Traceback" not in done.stderr
