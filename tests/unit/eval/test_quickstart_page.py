"""The page that the quickstart writes."""

import json
import math
import re
import shlex
import shutil

import pytest

from megatron_bipe.config import RunConfig
from megatron_bipe.config.load import dump_yaml
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.errors import BipeError
from megatron_bipe.eval.perplexity import EvalSettings, PerplexityResult
from megatron_bipe.eval.quickstart_page import NEXT_STEPS, quickstart_page, split_by_prompts
from megatron_bipe.eval.report import ModelResults, as_json
from megatron_bipe.train.metrics_file import STEP_TIME, VALID_LOSS, MetricsFile
from tests.helpers.pages import assert_self_contained
from tests.helpers.paths import ROOT

PERPLEXITIES = {"bipe_rope": (20.0, 19.5), "bipe_alibi": (21.0, 20.5), "rope": (20.25, math.inf)}
TEXTS = ["a <b> & c\nand more text\nin segments.\n", "unused"]


def outcome(length, perplexity):
    return PerplexityResult(length, perplexity, math.log(min(perplexity, 1e300)), 1.5, 11, 172, 173, 0, 0.25)


@pytest.fixture
def folder(tmp_path, write_text_dataset, make_eval_model):
    """The output folder of a quickstart, written by the code that writes it there."""
    folder = tmp_path / "quick <start>"
    for split in ("train", "valid"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_text_dataset(folder / "data" / split, [TEXTS])
    models = []
    for name, values in PERPLEXITIES.items():
        models.append(ModelResults(make_eval_model(name, name=name), tuple(map(outcome, (16, 32), values))))
        run_dir = folder / "runs" / name
        run_dir.mkdir(parents=True)
        run = RunConfig.model_validate({"run_dir": str(run_dir), "train": {"precision": "fp32"}})
        (run_dir / "config.yaml").write_text(dump_yaml(run))
        metrics = MetricsFile(run_dir / "metrics.jsonl", last_step=0)
        for step in range(1, 5):
            metrics.add({"step": step, "tokens": 512 * step, "loss/train_nats": 6.0 / step, STEP_TIME: 0.25})
            metrics.add({"step": step, "tokens": 512 * step, VALID_LOSS: 5.0 / step})
        metrics.close()
    (folder / "evaluation").mkdir()
    report = as_json(TokenDataset(folder / "data" / "valid"), EvalSettings(max_tokens=100), models)
    (folder / "evaluation" / "perplexity.json").write_text(json.dumps(report))
    (folder / "logs").mkdir()
    (folder / "logs" / "times.json").write_text(
        json.dumps({"steps_s": {"Train <x>": 61.0, "Export": 5.5}, "total_s": 66.5})
    )
    (folder / "generated.txt").write_text("Once upon <i>a</i> time\n\n\x1bdef f():\n\n    return &x\n")
    return folder


def test_page_holds_what_a_newcomer_wants_to_see_and_loads_nothing(folder):
    html = quickstart_page(folder, "The effect <shows>.", prompts=["Once upon"], machine="a <machine>")
    outline = assert_self_contained(html)
    assert [tag for tag, _ in outline.elements].count("h2") == 6
    links = [attributes["href"] for tag, attributes in outline.elements if tag == "a"]
    assert links == ["https://arxiv.org/abs/2401.16421"]
    text = outline.text
    assert "The effect <shows>." in text and "a <machine>" in text and "fp32" in text
    for value in ("19.50", "20.25", "inf", "2,048", "0.250", "61.0 s", "Train <x>", "1:06 min", "quick <start>"):
        assert value in text
    assert len(re.findall(r"<svg ", html)) == 4
    names = re.findall(r'<text style="[^"]*fill: var\(--line(\d)\)[^"]*"[^>]*>([^<]*)<', html)
    assert set(names) == {("0", "bipe_rope"), ("1", "bipe_alibi"), ("0", "rope ↑"), ("0", "rope")}


def test_page_escapes_corpus_and_generated_text(folder):
    html = quickstart_page(folder, "verdict", prompts=["Once upon"])
    assert "<b>&lt;</b>" in html and "<b>Once upon</b> &lt;i&gt;a&lt;/i&gt; time" in html
    assert r"\x1bdef f()" in html and "\x1b" not in html and "return &amp;x" in html


def test_page_without_recorded_times_shows_none(folder):
    assert 'class="bars"' in quickstart_page(folder, "verdict")
    (folder / "logs" / "times.json").unlink()
    assert 'class="bars"' not in quickstart_page(folder, "verdict")


def test_page_of_models_that_all_diverged_is_drawn(folder):
    path = folder / "evaluation" / "perplexity.json"
    report = json.loads(path.read_text())
    for model in report["models"]:
        model["results"] = [result | {"perplexity": None} for result in model["results"]]
    path.write_text(json.dumps(report))
    assert "bipe_alibi ↑" in quickstart_page(folder, "verdict")


FILES = (
    "evaluation/perplexity.json",
    "runs/rope/config.yaml",
    "runs/rope/metrics.jsonl",
    "data/train/manifest.json",
    "data/valid/manifest.json",
    "data/valid/tokenizer",
    "generated.txt",
)


@pytest.mark.parametrize("name", FILES)
def test_page_names_a_missing_file(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(BipeError) as error:
        quickstart_page(folder, "verdict")
    assert error.value.location in {str(path), str(path.parent)} and path.name in str(error.value)


@pytest.mark.parametrize("name", [*FILES[:5], "data/valid/tokenizer/tokenizer.json", "logs/times.json"])
def test_page_names_a_damaged_file(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-9] + b"\x00{")
    with pytest.raises(BipeError) as error:
        quickstart_page(folder, "verdict")
    assert error.value.location.startswith(str(path))


@pytest.mark.parametrize("content", ['{"models": []}', '{"protocol_means": "x", "models": []}'])
def test_page_names_an_evaluation_without_results(folder, content):
    path = folder / "evaluation" / "perplexity.json"
    path.write_text(content)
    with pytest.raises(BipeError) as error:
        quickstart_page(folder, "verdict")
    assert error.value.location == str(path)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ((), [("", "A b\n\nmore\n\nC d")]),
        (("A", "C"), [("A", " b\n\nmore"), ("C", " d")]),
        (("C",), [("", "A b\n\nmore"), ("C", " d")]),
        (("X", "C"), [("", "A b\n\nmore"), ("C", " d")]),
    ],
)
def test_split_by_prompts_gives_each_prompt_its_continuation(prompts, expected):
    assert split_by_prompts("A b\n\nmore\n\nC d", prompts) == expected


@pytest.mark.parametrize("lines", [lines for _, _, lines in NEXT_STEPS])
def test_next_steps_are_commands_of_this_project(lines):
    sources = "".join(path.read_text() for name in ("tools", "preprocessing") for path in (ROOT / name).rglob("*.py"))
    sources += (ROOT / "pretrain.py").read_text()
    for words in map(shlex.split, lines.replace("\\\n", "").strip().splitlines()):
        assert words[0] in {"python", "deepspeed", "tensorboard", "sbatch", "HOSTFILE=my_hosts"}
        for word in words[1:]:
            if word.startswith("--") and words[0] in {"python", "deepspeed"}:
                assert f'"{word}"' in sources
            if word.startswith(("tools/", "examples/", "ds_configs/")) or word == "pretrain.py":
                assert (ROOT / word).is_file()
