"""Messages for many bad inputs, as one text to review: tests/golden/messages.txt.

pytest tests/unit/test_messages.py --update-golden
"""

import json
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_bipe.checkpoint.find import find_checkpoint, read_data_record
from megatron_bipe.checkpoint.verify import read_weights
from megatron_bipe.config import ModelConfig
from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import Sources, load_run_config
from megatron_bipe.config.validate import validate_run
from megatron_bipe.data.blend import Blend, count_slots
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection.verify import find_problems
from megatron_bipe.data.manifest import Manifest, PromptAnswerRecord
from megatron_bipe.data.prompt_answer import open_text
from megatron_bipe.data.segments import SegmentRule, resolve_rule
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.engine.ds_settings import check_settings
from megatron_bipe.errors import BipeError
from megatron_bipe.eval.eval_model import EvalModel, check_compatible
from megatron_bipe.eval.perplexity import EvalSettings, evaluate_perplexity
from megatron_bipe.eval.quickstart_results import read_losses
from megatron_bipe.eval.report import prepare_output
from megatron_bipe.hf.authors_checkpoint import read_authors_checkpoint
from megatron_bipe.hf.checksums import write_checksums
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.hf_config import DataFields
from megatron_bipe.hf.load import load_exported
from megatron_bipe.hf.transformers_models import load_auto_tokenizer
from megatron_bipe.io import locked
from megatron_bipe.model.transformer import build_model
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.environment import requested_device
from megatron_bipe.runtime.launcher_env import Rendezvous, read_launch
from megatron_bipe.runtime.preemption import parse_duration
from megatron_bipe.tasks.scrolls.evaluate import answer, results_table
from megatron_bipe.tasks.scrolls.tasks import TASKS, Question, find_task
from megatron_bipe.train.batch_loader import check_manifest
from megatron_bipe.train.profile import Profile
from megatron_bipe.train.run_changes import check_branch, check_same_run
from megatron_bipe.train.run_folder import write_run_folder
from megatron_bipe.train.supervise import usable_hosts
from megatron_bipe.train.warm_start import start_run
from preprocessing.build import BuildOptions, build
from preprocessing.destinations import Split
from preprocessing.readers.inputs import find_inputs
from tests.helpers import datasets
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.paths import ROOT
from tests.helpers.tools import script

GOLDEN = ROOT / "tests" / "golden" / "messages.txt"
TINY = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, ffn_size=8, vocab_size=16, intra_size=4)
MAIN = Mesh(0, 0, 1, 1, torch.device("cpu"))
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
SRUN = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


class Given:
    """Files from which the bad inputs are made, in a separate folder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch

    def file(self, name: str, content: str | bytes = b"") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def dataset(self, name: str = "data", vocab_size: int = 16, **more: object) -> Path:
        """Write a dataset of 12 tokens."""
        datasets.write_dataset(
            self.folder / name, [[[1, 2, 5, 3], [4, 5, 6, 7, 8, 9, 5, 1]]], vocab_size=vocab_size, **more
        )
        return self.folder / name

    def opened(self, *arguments: object, **more: object) -> TokenDataset:
        return TokenDataset(self.dataset(*arguments, **more))

    def changed(self, name: str, change: Callable[[bytes], bytes]) -> Path:
        """Write a dataset in which one file is replaced."""
        folder = self.dataset()
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder

    def tokenizer(self) -> Path:
        datasets.write_letters(self.folder / "letters", {"bos_token": "<s>"})
        return self.folder / "letters"

    def run_dir(self, *settings: str) -> Path:
        """Write a run with a checkpoint of step 10."""
        run = load_run_config(None, [f"run_dir={self.folder / 'run'}", "train.precision=bf16", *settings])
        write_run_folder(run, TokenDataset(self.dataset()).manifest.record, load_tokenizer(self.tokenizer()))
        write_checkpoint(run.run_dir, 10, {"0.x": torch.ones(3)})
        return run.run_dir

    def subject(self, encoding: str = "bipe_rope", **changes: object) -> EvalModel:
        config = TINY.model_copy(update={"encoding": encoding, **changes})
        return EvalModel("tiny", "runs/tiny", build_model(config, 0).eval(), config, "a" * 64, datasets.RULE)

    def exported(self, **changes: object) -> Path:
        """Export a model and change its config.json; None removes a key."""
        subject = self.subject()
        sequences = (torch.arange(4)[None], torch.arange(4)[None] % 2, torch.arange(4)[None] // 2)
        fields = DataFields("fixed:2", (), "a" * 64, {"bos": 1})
        folder = self.folder / "model"
        options = ExportOptions(dtype=torch.float32, overwrite=True)
        export_model(subject.model.state_dict(), subject.config, folder, fields, sequences, None, options)
        settings = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in settings.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        write_checksums(folder, {})
        return folder

    def export_over(self, name: str) -> None:
        (self.folder / "model").mkdir()
        self.file(f"model/{name}")
        self.exported()


def check(*settings: str, num_ranks: int = 8) -> None:
    validate_run(load_run_config(None, settings), num_ranks, Sources(Path("run.yaml")))


def with_ds_config(content: Mapping[str, object], *settings: str) -> None:
    engine_config(load_run_config(None, ["train.precision=bf16", *settings]), dict(content), 4, "ds.json")


def launch(env: Mapping[str, str]) -> None:
    read_launch(env, lambda _: Rendezvous("a", 1), lambda: 1)


def device(given: Given, name: str) -> None:
    given.patch.setenv("BIPE_DEVICE", name)
    requested_device()


def bad_byte(given: Given) -> None:
    datasets.write_text_dataset(given.folder, [["a text of some length"]])
    given.file("part-00000.bin", b"\2\0" + (given.folder / "part-00000.bin").read_bytes()[2:])
    raise next(find_problems([TokenDataset(given.folder)]))


def damaged_checkpoint(given: Given, name: str, content: bytes | None) -> None:
    run_dir = given.run_dir()
    path = find_checkpoint(run_dir).folder / name
    path.write_bytes(content) if content is not None else path.unlink()
    read_weights(find_checkpoint(run_dir))


def other_run(given: Given, *settings: str, allow: tuple[str, ...] = ()) -> None:
    run = load_run_config(None, [f"run_dir={given.run_dir()}", "train.precision=bf16", *settings])
    check_same_run(run, TokenDataset(given.folder / "data").manifest.record, allow)


def branch(given: Given, step: str, *settings: str) -> None:
    trunk = given.run_dir()
    named = [f"train.branch_from={trunk}{step}", f"run_dir={given.folder / 'branch'}", "train.precision=bf16"]
    check_branch(load_run_config(None, [*named, *settings]), TokenDataset(given.folder / "data").manifest.record)


def two_runs(folder: Path) -> None:
    def begin() -> None: ...

    with locked(folder / "run" / "running"), locked(folder / "run" / "running", begin):
        pass


def built(given: Given, content: str, output: Path | None = None, **more: object) -> None:
    inputs = [str(given.file("in.jsonl", content))]
    build(BuildOptions(inputs, str(given.tokenizer()), output or given.folder / "out", segments="newline", **more))


def evaluated(given: Given, length: int, **settings: object) -> None:
    evaluate_perplexity(given.subject(), given.opened(), length, EvalSettings(**settings))


def diverged(given: Given) -> None:
    subject = given.subject()
    nn.init.constant_(subject.model[1].mlp.down.weight, torch.nan)
    evaluate_perplexity(subject, given.opened(), 4, EvalSettings())


def from_tool(name: str, function: str, *arguments: object) -> None:
    with script(name) as module:
        getattr(module, function)(*arguments)


def examples(given: Given) -> Path:
    return given.dataset(examples=PromptAnswerRecord(task="sums", seq_len_tokens=8))


def removed(path: Path, name: str) -> Path:
    (path / name).unlink()
    return path


YARN = "model.rope_scaling={type: yarn, factor: 16}"

CASES: dict[str, dict[str, Callable[[Given], object]]] = {
    "Configuration": {
        "an unknown key": lambda _: load_run_config(None, ["model.num_layer=4"]),
        "a setting without a value": lambda _: load_run_config(None, ["train.steps"]),
        "text for a number": lambda _: load_run_config(None, ["train.steps=soon"]),
        "a number out of range, in a section": lambda _: load_run_config(None, ["train={steps: 0}"]),
        "an unknown encoding": lambda _: load_run_config(None, ["model.encoding=rop"]),
        "a file that is not there": lambda given: load_run_config(given.file("there.yaml").parent / "absent.yaml"),
        "a file that is not YAML": lambda given: load_run_config(given.file("run.yaml", "model: [")),
        "a key given twice": lambda given: load_run_config(given.file("run.yaml", "train: {seed: 1, seed: 2}")),
        "three mistakes": lambda _: load_run_config(None, ["train.steps=0", "model.encoding=rop", "oops=1"]),
        "heads that do not divide the width": lambda _: check("model.num_heads=7"),
        "a setting that the encoding does not use": lambda _: check("model.encoding=alibi", YARN),
        "a setting that is missing": lambda _: check(YARN),
        "sequences longer than the encoded positions": lambda _: check(
            "model.encoding=learned", "model.train_len_tokens=512"
        ),
        "warm-up beyond the steps": lambda _: check("train.steps=100"),
        "a batch that cannot be divided among the ranks": lambda _: check("train.global_batch=20"),
        "validation on the training set": lambda _: check("data.path=a", "data.valid_path=a"),
        "a blend with a weight too small": lambda _: count_slots([1, 1e-9], ["data/a", "data/b"]),
        "a blend that names a dataset twice": lambda _: check("data.path=[a, b, a/]"),
    },
    "DeepSpeed configuration": {
        "a value that the run sets otherwise": lambda _: with_ds_config({"train_batch_size": 128}),
        "a section that belongs to the run": lambda _: with_ds_config({"optimizer": {"type": "Adam"}}),
        "a section that is a number": lambda _: with_ds_config({"zero_optimization": 2}),
        "an unknown stage": lambda _: with_ds_config({"zero_optimization": {"stage": 4}}),
        "half precision": lambda _: with_ds_config({"fp16": {"enabled": True}}),
        "states on NVMe": lambda _: with_ds_config(
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
        ),
        "a pipeline with ZeRO-2": lambda _: with_ds_config({"zero_optimization": {"stage": 2}}, "parallel.pipeline=2"),
        "a file that is not there": lambda given: read_ds_config(given.folder / "ds.json"),
        "a file that is not JSON": lambda given: read_ds_config(given.file("ds.json", "{")),
        "a key given twice": lambda given: read_ds_config(given.file("ds.json", '{"bf16": {}, "bf16": {}}')),
        "a misspelt section": lambda _: check_settings({"zero_optimisation": {"stage": 2}}, "ds.json"),
        "a misspelt key and a deprecated one": lambda _: check_settings(
            {"zero_optimization": {"stage": 2, "overlap_com": True, "cpu_offload": True}}, "ds.json"
        ),
        "a section without effect": lambda _: check_settings(
            {"activation_checkpointing": {"profile": True}}, "ds.json"
        ),
    },
    "Layouts": {
        "ranks that hold no complete replica": lambda _: check("parallel={tensor: 2, context: 2, pipeline: 3}"),
        "heads that tensor parallelism cannot shard": lambda _: check("parallel.tensor=8"),
        "sequences that context parallelism cannot shard": lambda _: check(
            "parallel.context=4", "train.seq_len_tokens=1022"
        ),
        "sequence parallelism alone": lambda _: check("parallel.sequence=true"),
        "more stages than layers": lambda _: check("parallel.pipeline=14", num_ranks=14),
    },
    "Launches": {
        "half a launch": lambda _: launch({"RANK": "1", "WORLD_SIZE": "2"}),
        "no port": lambda _: launch(TORCHRUN),
        "a port out of range": lambda _: launch({**TORCHRUN, "MASTER_PORT": "70000"}),
        "a rank beyond the launch": lambda _: launch({**TORCHRUN, "MASTER_PORT": "2950", "RANK": "2"}),
        "a count that is not a number": lambda _: launch({**TORCHRUN, "MASTER_PORT": "2950", "WORLD_SIZE": "two"}),
        "hosts without names": lambda _: launch(SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}),
        "an unknown device": lambda given: device(given, "gpu"),
        "a duration without a unit": lambda _: parse_duration("10", "--stop-at"),
        "a profile of a negative number of steps": lambda given: Profile(-1, given.folder, MAIN),
        "fewer hosts than asked for": lambda given: usable_hosts(given.run_dir(), ["a", "b"], 4, 3),
    },
    "Datasets": {
        "a folder that is not there": lambda given: TokenDataset(given.folder / "absent"),
        "no manifest": lambda given: TokenDataset(removed(given.dataset(), "manifest.json")),
        "data of Megatron": lambda given: TokenDataset(
            removed(removed(given.dataset(), "manifest.json"), "part-00000.seg")
        ),
        "a manifest cut off": lambda given: TokenDataset(given.changed("manifest.json", lambda content: content[:99])),
        "a shard's file missing": lambda given: TokenDataset(removed(given.dataset(), "part-00000.bin")),
        "a shard's file cut off": lambda given: TokenDataset(
            given.changed("part-00000.bin", lambda content: content[:4])
        ),
        "another file under the name of an index": lambda given: TokenDataset(
            given.changed("part-00000.idx", lambda content: b"PK" + content[2:])
        ),
        "a token beyond the vocabulary": lambda given: TokenDataset(
            given.changed("part-00000.bin", lambda content: b"\xff\0" + content[2:])
        ).sequences([0], 8),
        "a byte changed, found by verify": bad_byte,
        "another tokenizer than expected": lambda given: given.opened().check_tokenizer("b" * 64, "runs/a"),
        "another segment rule than expected": lambda given: given.opened().check_rule(
            SegmentRule(spec="fixed:3", token_ids=()), "runs/a"
        ),
        "a dataset shorter than a sequence": lambda given: given.opened().num_sequences(1024),
        "more ids than the model has": lambda given: check_manifest(
            load_run_config(None, ["model.vocab_size=8"]), Manifest.load(given.dataset()), given.folder / "data"
        ),
        "another rule than data.segments": lambda given: check_manifest(
            load_run_config(None, ["data.segments=reference"]), Manifest.load(given.dataset()), given.folder / "data"
        ),
        "a blend of two segment rules": lambda given: Blend(
            [given.opened("a"), given.opened("b", rule=SegmentRule(spec="[6]", token_ids=(6,)))], None, 8, 0
        ),
        "examples where text is needed": lambda given: open_text(examples(given)),
    },
    "Tokenizers and segment rules": {
        "a folder that is not there": lambda given: load_tokenizer(given.folder / "absent"),
        "a folder without a tokenizer": lambda given: load_tokenizer(given.file("model/notes.txt").parent),
        "a file cut off": lambda given: load_tokenizer(given.file("tokenizer.json", "{")),
        "an unknown rule": lambda given: resolve_rule("paragraph", load_tokenizer(given.tokenizer())),
        "a rule of a token that is not there": lambda given: resolve_rule('["ab"]', load_tokenizer(given.tokenizer())),
        "segments of no tokens": lambda given: resolve_rule("fixed:0", load_tokenizer(given.tokenizer())),
    },
    "Preprocessing": {
        "an input that is not there": lambda given: find_inputs([str(given.folder / "absent.jsonl")]),
        "malformed lines": lambda given: built(given, '{"text": "a"}\n{\n', max_malformed=0),
        "no text under the key": lambda given: built(given, '{"content": "a"}\n', max_malformed=9),
        "a folder that holds a dataset": lambda given: (
            built(given, '{"text": "a"}\n'),
            built(given, '{"text": "a"}\n'),
        ),
        "fractions that do not add up": lambda _: Split.parse("train=0.7,valid=0.7"),
        "a file where the output's folder should be": lambda given: built(
            given, "a", output=given.folder / "in.jsonl" / "out"
        ),
    },
    "Runs and checkpoints": {
        "no checkpoint": lambda given: find_checkpoint(given.folder / "run"),
        "a step that is not there": lambda given: find_checkpoint(f"{given.run_dir()}@30"),
        "no index": lambda given: damaged_checkpoint(given, "state.json", None),
        "an index that was changed": lambda given: damaged_checkpoint(given, "state.json", b"{}"),
        "weights that are missing": lambda given: damaged_checkpoint(given, "rank-00000.safetensors", None),
        "weights cut off": lambda given: damaged_checkpoint(given, "rank-00000.safetensors", b"x"),
        "a run of another model": lambda given: other_run(given, "model.num_layers=2"),
        "a changed learning rate": lambda given: other_run(given, "optimizer.lr=2e-4"),
        "a change that cannot be allowed": lambda given: other_run(given, allow=("model.num_layers",)),
        "a branch of another model": lambda given: branch(given, "@10", "model.num_layers=2"),
        "a branch without a step": lambda given: branch(given, ""),
        "a branch that ends at once": lambda given: branch(given, "@10", "train.steps=10"),
        "no record of the data": lambda given: read_data_record(removed(given.run_dir(), "data.json")),
        "two runs in a folder": lambda given: two_runs(given.folder),
        "a start from another model": lambda given: start_run(
            load_run_config(None, ["model.encoding=rope", f"run_dir={given.folder}"]), given.subject(), {}
        ),
    },
    "Exports and imports": {
        "a folder that is not a model": lambda given: load_exported(given.folder),
        "a model of another type": lambda given: load_exported(given.exported(model_type="gpt2")),
        "a model without its segment rule": lambda given: load_exported(given.exported(segments=None)),
        "an impossible width": lambda given: load_exported(given.exported(hidden_size=-3)),
        "more layers than weights": lambda given: load_exported(given.exported(num_hidden_layers=2)),
        "weights that were changed": lambda given: load_exported(
            given.file("model/model.safetensors", b"x").parent if given.exported() else given.folder
        ),
        "weights that are missing": lambda given: load_exported(removed(given.exported(), "model.safetensors")),
        "a model that names its own code": lambda given: load_auto_tokenizer(
            given.exported(model_type="llama", auto_map={"AutoConfig": "mine.Config"})
        ),
        "checksums of a file outside the folder": lambda given: load_exported(
            given.file("model/SHA256SUMS", f"{'0' * 64}  ../weights\n").parent if given.exported() else given.folder
        ),
        "an export over other files": lambda given: given.export_over("thesis.tex"),
        "a model that is not of the published layout": lambda given: read_authors_checkpoint(given.exported()),
    },
    "Evaluation": {
        "lengths that are not numbers": lambda _: from_tool("evaluate", "parse_lengths", "1k,x"),
        "a sequence of one token": lambda given: evaluated(given, 1),
        "a sequence longer than the text": lambda given: evaluated(given, 100),
        "a limit of no tokens": lambda given: evaluated(given, 4, max_tokens=0),
        "weights that are not numbers": diverged,
        "a dataset of another rule": lambda given: check_compatible(
            given.subject(), given.opened(rule=SegmentRule(spec="fixed:3", token_ids=()))
        ),
        "a dataset with more ids": lambda given: check_compatible(given.subject(), given.opened(vocab_size=17)),
        "results that are there already": lambda given: prepare_output(given.file("perplexity.json").parent, False),
        "a run without metrics": lambda given: read_losses(given.folder),
        "metrics cut off": lambda given: read_losses(given.file("metrics.jsonl", '{"step": 1, "tok').parent),
        "an unknown task": lambda _: find_task("qaspr"),
        "a split with some answers": lambda _: answer(
            None, TASKS["qasper"], [Question("a", "?", ("!",)), Question("b", "?", ())], 8192, 1
        ),
        "results cut off": lambda given: results_table(given.file("qasper.json", "{").parent),
        "a model's folder that is not one": lambda given: from_tool("_cli", "check_model_folder", given.folder),
    },
}


def test_messages_of_bad_inputs_are_those_that_were_reviewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    found = "".join(
        f"== {section}\n\n" + "".join(_entry(title, case, tmp_path, monkeypatch) for title, case in cases.items())
        for section, cases in CASES.items()
    )
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text()


def _entry(title: str, case: Callable[[Given], object], folder: Path, patch: pytest.MonkeyPatch) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    with patch.context() as undone, pytest.raises(BipeError) as caught:
        case(Given(folder, undone))
    text = f"{type(caught.value).__name__}: {caught.value}".replace(str(folder), "TMP")
    text = re.sub(r"(?!(.)\1{63})[0-9a-f]{64}", "SHA256", text)  # of weights, which depend on the processor
    return f"{title}\n{textwrap.indent(text, '    ')}\n\n"
