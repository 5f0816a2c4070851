"""`tools/evaluate.py perplexity` from the outside: checkpoints and exported models in, files and exit codes out."""

import json

import pytest

from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.eval.perplexity import EvalSettings, evaluate_perplexity
from tests.helpers.tools import assert_refuses, call_tool


@pytest.fixture
def command(tmp_path):
    """A function that returns a command line, which writes to tmp_path/out."""

    def arguments(models, dataset, *options, lengths="8,16,32"):
        given = ["--model", *models, "--data", dataset.path, "--lengths", lengths, "--output", tmp_path / "out"]
        return ["perplexity", *given, "--device", "cpu", *options]

    return arguments


@pytest.fixture
def evaluate(command, tmp_path):
    """A function that runs the command; returns its JSON."""

    def run(*arguments, **options):
        call_tool("evaluate", *command(*arguments, **options))
        return json.loads((tmp_path / "out" / "perplexity.json").read_text())

    return run


def perplexities(report):
    return {model["name"]: [result["perplexity"] for result in model["results"]] for model in report["models"]}


def test_command_checkpoint_and_export_of_one_model_agree(
    command, make_dataset, make_eval_model, documents, save_run, save_exported, tmp_path
):
    dataset = make_dataset(documents)
    eval_model = make_eval_model("bipe_rope", name="run")
    models = [save_run(eval_model, dataset), save_exported(eval_model._replace(name="exported"))]

    printed = call_tool("evaluate", *command(models, dataset)).output

    found = perplexities(json.loads((tmp_path / "out" / "perplexity.json").read_text()))
    want = [evaluate_perplexity(eval_model, dataset, length, EvalSettings()).perplexity for length in (8, 16, 32)]
    assert found == {"run": pytest.approx(want, rel=1e-6), "exported": pytest.approx(want, rel=1e-6)}
    assert f"{want[1]:,.2f}*" in printed and "172 predictions" in printed and "perplexity.png" in printed


def test_command_named_step_is_that_checkpoint(evaluate, make_dataset, make_eval_model, documents, save_run):
    dataset = make_dataset(documents)
    run_dir = save_run(make_eval_model(name="run"), dataset)
    found = perplexities(evaluate([run_dir, f"{run_dir}@5", f"{run_dir}@10"], dataset))
    assert found["run"] == found["run step 10"] != found["run step 5"]


def test_command_protocol_and_limit_reach_the_report(evaluate, make_dataset, make_eval_model, documents, save_run):
    dataset = make_dataset(documents)
    run_dir = save_run(make_eval_model(), dataset)
    report = evaluate([run_dir], dataset, "--protocol", "reference", "--max-tokens", "100", lengths="16,8")
    assert (report["protocol"], report["max_tokens"]) == ("reference", 100)
    [model] = report["models"]
    assert [(r["length_tokens"], r["num_windows"]) for r in model["results"]] == [(8, 6), (16, 2)]


def test_command_model_that_does_not_encode_the_longest_window_is_named_before_any_is_run(
    command, make_dataset, make_eval_model, documents, save_run, monkeypatch
):
    dataset = make_dataset(documents)
    runs = [save_run(make_eval_model(name, name=name), dataset) for name in ("rope", "learned")]
    monkeypatch.setattr("megatron_bipe.eval.perplexity.evaluate_perplexity", None)
    arguments = command(runs, dataset, lengths="16,64")
    assert_refuses("evaluate", arguments, ConfigError, 64, 16, "learned", location=f"{runs[1]}@10")


def test_command_existing_output_needs_overwrite(
    command, evaluate, make_dataset, make_eval_model, documents, save_run, tmp_path
):
    dataset = make_dataset(documents)
    run_dir = save_run(make_eval_model(), dataset)
    first = evaluate([run_dir], dataset)
    arguments = command([run_dir], dataset, lengths="4")
    assert_refuses("evaluate", arguments, ConfigError, "perplexity.json", "--overwrite", location=tmp_path / "out")
    again = evaluate([run_dir], dataset, "--overwrite", lengths="8")
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
    ("model_of", "lengths", "error", "observed", "location"),
    [
        (lambda run: run.with_name("absent"), "8", CheckpointError, [], "absent"),
        (lambda run: run.parent, "8", CheckpointError, ["config.json"], None),
        (lambda run: f"{run}@7", "8", CheckpointError, [7, "5, 10"], "tiny@7"),
        (spoil_record, "8", CheckpointError, ["rule"], "data.json"),
        (drop_record, "8", CheckpointError, ["No such file"], "data.json"),
        (spoil_nothing, "8,two", ConfigError, ["'two'"], "--lengths"),
        (spoil_nothing, "8,1", ConfigError, ["'1'"], "--lengths"),
        (spoil_nothing, "8,", ConfigError, ["''"], "--lengths"),
        (spoil_nothing, "8,4096", DataError, [173, 4096], "corpus"),
    ],
)
def test_command_bad_input_is_named_before_anything_is_written(
    command,
    make_dataset,
    make_eval_model,
    documents,
    save_run,
    tmp_path,
    model_of,
    lengths,
    error,
    observed,
    location,
):
    dataset = make_dataset(documents)
    model = model_of(save_run(make_eval_model(), dataset))
    arguments = command([model], dataset, lengths=lengths)
    assert_refuses("evaluate", arguments, error, *observed, location=location)
    assert not list((tmp_path / "out").glob("*"))


def test_command_unknown_device_is_named(command, make_dataset, make_eval_model, documents, save_run):
    dataset = make_dataset(documents)
    arguments = command([save_run(make_eval_model(), dataset)], dataset, "--device", "abacus")
    assert_refuses("evaluate", arguments, ConfigError, "'abacus'", location="--device")


def test_command_wrong_tokenizer_is_named_with_both_fingerprints(
    command, make_dataset, make_eval_model, documents, save_run
):
    run_dir = save_run(make_eval_model(), make_dataset(documents))
    other = make_dataset(documents, fingerprint="b" * 64, name="other")
    assert_refuses("evaluate", command([run_dir], other), DataError, "a" * 64, "b" * 64)


@pytest.mark.parametrize("suffix", ["bin", "idx", "seg"])
def test_command_damaged_data_is_refused_unless_it_is_not_to_be_verified(
    command, make_dataset, make_eval_model, documents, save_run, suffix
):
    dataset = make_dataset(documents)
    models = [save_run(make_eval_model("bipe_rope", name="run"), dataset)]
    path = dataset.shards[1].path(suffix)
    path.write_bytes(path.read_bytes()[:-2] + b"\x0f\0")  # also a valid token
    expected = dataset.manifest.shards[1].files[suffix].sha256
    assert_refuses("evaluate", command(models, dataset), DataError, expected, location=path)
    if suffix != "idx":
        assert str(dataset.path) in call_tool("evaluate", *command(models, dataset, "--no-verify")).output
