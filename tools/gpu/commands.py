"""The commands themselves: training that is killed and stopped, memory limits, evaluation, export, tests."""

import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench._bench import VOCAB_SIZE, make_dataset
from gpu.check import ROOT, TOY, Check, last_line
from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.run_files import METRICS
from megatron_bipe.runtime.child_processes import ChildProcess, run_command
from megatron_bipe.runtime.environment import DEVICE

SAVE_EVERY, KILL_AT, STOP_AT, STEPS = 5, 8, 12, 60
LOSS, POLL_S = "loss/train_nats", 0.005
BATCHES = ("train.micro_batch=8", "train.global_batch=32")


def dataset(check: Check) -> Path:
    """Return a dataset of random tokens, which is made once for all parts, and its tokenizer."""
    folder = check.folder.parent / "data"
    if not folder.is_dir():
        draft = check.folder / "data"
        tokenizer = load_tokenizer(_write_tokenizer(check.folder / "tokenizer", check.choose(VOCAB_SIZE, 512)))
        make_dataset(draft, check.choose(50e6, 1e5), tokenizer=tokenizer)
        draft.rename(folder)
    return folder


def _write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Write a tokenizer of bytes with a vocabulary of this size, most of which no text uses."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [f"<unused{number}>" for number in range(vocab_size - len(pieces))]
    ids = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def pretrain(check: Check, run_dir: Path, *settings: str, zero: str = "1") -> list[str]:
    """Return the command that trains 151M parameters in `run_dir`; on a CPU, a toy."""
    sizes = BATCHES if check.on_gpu else (*TOY, "train.global_batch=8")
    given = [f"run_dir={run_dir}", f"data.path={dataset(check)}", "data.valid_path=null", "train.log_every=1"]
    given += ["optimizer.warmup_steps=0", "checkpoint.min_free_gib=0", *sizes, *settings]
    options = [part for setting in given for part in ("--set", setting)]
    return [sys.executable, "pretrain.py", "--ds_config", f"ds_configs/zero{zero}.json", *options]


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run a command with its output in a file, and return its exit code."""
    with log.open("wb") as file:
        return run_command(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode


def dry_runs(check: Check) -> None:
    """Report the exit codes of --dry-run of the recipes."""
    for size in ("151m", "1.6b"):
        command = [sys.executable, "pretrain.py", "--ds_config", "ds_configs/zero1.json", "--dry-run", "1"]
        command += ["--config", f"examples/bipe_rope_{size}.yaml"]
        command += ["--set", f"data.path={dataset(check)}", "--set", "data.valid_path=null"]
        command += ["--set", f"run_dir={check.folder / size}", "--set", "checkpoint.min_free_gib=0"]
        check.report(f"dry run of {size}: exit code", run_logged(command, check.folder / f"dry-run-{size}.txt"))


def checkpoint(check: Check) -> None:
    """Compare a run that was killed, resumed, stopped and resumed again with one that was not."""
    more = (f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", "checkpoint.keep_last=2", "train.compile=off")
    whole, broken = check.folder / "undisturbed", check.folder / "disturbed"
    check.report("undisturbed: exit code", run_logged(pretrain(check, whole, *more), check.folder / "undisturbed.txt"))
    times = [line["time/step_s"] for line in read_metrics(whole)]
    check.report("undisturbed: median s per step", statistics.median(times))
    check.report("undisturbed: longest step after the first save, s", max(times[SAVE_EVERY:]))
    command = pretrain(check, broken, *more)
    check.report("killed: exit code", _train_until(command, check.folder / "killed.txt", broken, KILL_AT, 9))
    check.report("killed: step of its checkpoint", find_checkpoint(broken).step)
    check.report("stopped: exit code", _train_until(command, check.folder / "stopped.txt", broken, STOP_AT, 15))
    check.report("resumed: exit code", run_logged(command, check.folder / "resumed.txt"))
    expected, found = ({line["step"]: line[LOSS] for line in read_metrics(folder)} for folder in (whole, broken))
    worst = max(abs(found.get(step, float("inf")) - loss) / loss for step, loss in expected.items())
    check.report("disturbed: largest loss difference", worst)


def _train_until(command: Sequence[str], log: Path, run_dir: Path, step: int, number: int) -> int:
    """Train on until a step is done and there is a checkpoint, then send a signal; return the exit code."""
    lines_before, newest = len(read_metrics(run_dir)), run_dir / "checkpoints" / "latest"
    with log.open("wb") as file, ChildProcess(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as child:
        is_running_again = lines_before == 0
        while child.process.poll() is None:
            lines = read_metrics(run_dir)
            is_running_again = is_running_again or len(lines) != lines_before
            if is_running_again and lines and lines[-1]["step"] >= step and newest.exists():
                child.send(signal.Signals(number))
                return child.process.wait()
            time.sleep(POLL_S)
        return child.process.wait()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the complete lines of metrics.jsonl that have a loss."""
    file = run_dir / METRICS
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [parsed for parsed in map(json.loads, lines) if LOSS in parsed]


def memory(check: Check) -> None:
    """Report how a run ends that needs more memory than there is; on a CPU, one whose settings are refused."""
    import torch

    def free_bytes() -> int:
        return int(torch.cuda.mem_get_info()[0]) if check.on_gpu else 0

    before, log = free_bytes(), check.folder / "out-of-memory.txt"
    settings = (
        "train.steps=1",
        "train.compile=off",
        f"train.micro_batch={check.choose(1024, 3)}",
        "train.global_batch=1024",
    )
    check.report("out of memory: exit code", run_logged(pretrain(check, check.folder / "run", *settings), log))
    text = log.read_text(errors="replace")
    for setting in ("train.micro_batch", "parallel.recompute"):
        check.report(f"out of memory: message names {setting}", float(setting in text))
    check.report("out of memory: last line", last_line(log))
    check.report("out of memory: GiB still used after it", (before - free_bytes()) / 2**30)


def evaluation(check: Check) -> None:
    """Evaluate, export and continue texts with a model of a few updates."""
    run_dir, model = check.folder / "run", check.folder / "exported"
    trained = pretrain(check, run_dir, "train.steps=2", "train.compile=off")
    lengths, tokens = ("1024,8192,16384", "100000") if check.on_gpu else ("32,64", "2000")
    perplexity = ["--data", str(dataset(check)), "--lengths", lengths, "--max-tokens", tokens]
    perplexity += ["--output", str(check.folder / "perplexity")]
    commands = {
        "training": trained,
        "perplexity": _tool("evaluate", "perplexity", "--model", run_dir, *perplexity),
        "export": _tool("export_hf", "--checkpoint", run_dir, "--output", model),
        "generation": _tool("generate", "--model", model, "--prompt", "a text", "--max-new-tokens", "4"),
    }
    for name, command in commands.items():
        began_s = time.monotonic()
        check.report(f"{name}: exit code", run_logged(command, check.folder / f"{name}.txt"))
        check.report(f"{name}: s", time.monotonic() - began_s)
    _time_generation(check, model)


def _tool(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, f"tools/{name}.py", *map(str, arguments)]


def _time_generation(check: Check, folder: Path) -> None:
    """Report the milliseconds that `generate` of transformers takes per token."""
    import torch

    from megatron_bipe.hf.transformers_models import load_causal_lm
    from megatron_bipe.runtime.hardware import DTYPES, choose_precision, device_type

    device, new_tokens = torch.device(device_type()), check.choose(64, 8)
    dtype = DTYPES[choose_precision("auto", device, "--dtype").precision]
    model = load_causal_lm(folder, dtype).to(device)
    ids = torch.randint(300, 500, (1, check.choose(512, 16)), device=device)
    for _ in range(2):  # the first one is a warm-up
        began_s = time.perf_counter()
        made = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        made.cpu()
        elapsed_s = time.perf_counter() - began_s
    check.report("generation: ms per token", 1000 * elapsed_s / new_tokens)


def tests(check: Check) -> None:
    """Report how many tests of tests/gpu passed on this device."""
    report, log = check.folder / "pytest.xml", check.folder / "pytest.txt"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/gpu"]
    env = {DEVICE: "cuda", "GPU_TESTS_ON_CPU": ""} if check.on_gpu else {DEVICE: "cpu", "GPU_TESTS_ON_CPU": "1"}
    with log.open("wb") as file:
        run_command(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env)
    found = re.findall(r'\b(tests|failures|errors|skipped)="(\d+)"', report.read_text(encoding="utf-8"))
    counts = {name: float(number) for name, number in found[:4]}  # of the suite; those of test cases follow
    check.report("tests passed", counts.pop("tests") - sum(counts.values()))
    check.report("tests failed", counts["failures"] + counts["errors"])
    check.report("tests skipped", counts["skipped"])
