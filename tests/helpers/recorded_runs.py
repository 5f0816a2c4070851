"""Run folders as training writes them, without training, and the truth about where their time went."""

import json
from collections import Counter
from pathlib import Path

from megatron_bipe.config import dump_yaml, load_run_config

SMALL = (
    "model={num_layers: 2, hidden_size: 32, num_heads: 4, ffn_size: 48, vocab_size: 400, intra_size: 64}",
    "train={steps: 1000, seq_len_tokens: 32, global_batch: 8, micro_batch: 2, precision: fp32, log_every: 4}",
)
PROVENANCE = {
    "code": {"commit": "0123456789abcdef", "dirty": True},
    "versions": {"python": "3.11", "torch": "2.13", "source": "fedcba"},
    "hosts": {"node1": 4, "node2": 4},
    "devices": {"GPU X": 8},
    "device_type": "cpu",
    "layout": {"tensor": 2, "context": 1, "pipeline": 1, "data": 4, "sequence": False},
    "zero": 1,
    "deepspeed": {"file": "zero1.json", "settings": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}},
    "data": "a" * 64,
    "allow": [],
    "settings": {"optimizer.lr": 0.001},
}


class RecordedRun:
    """A run with a clock that moves as its calls say. Times in eighths of a second are exact."""

    def __init__(self, run_dir: Path, *settings: str) -> None:
        self.run_dir, self.step, self.time_s = run_dir, 0, 1.7e9
        self.lines, self.events, self._ledger, self._stopped, self._attempt = [], [], [], set(), 0
        run_dir.mkdir(parents=True, exist_ok=True)
        config = load_run_config(None, [*SMALL, f"run_dir={run_dir}", *settings])
        (run_dir / "config.yaml").write_text(dump_yaml(config))

    def start(self, waited_s=0.0, loading_s=0.0, setup_s=0.0, **facts):
        """Wait, start a process, and begin to train from `step`."""
        self._pass("waiting", waited_s)
        launched_at = self.time_s
        self._pass("starts", loading_s)
        self._attempt += 1
        last = {key: self.lines[-1][key] for key in ("step", "time")} if self.lines else None
        self.event("start", step=self.step, ranks=8, launched_at=launched_at, before=last, **(PROVENANCE | facts))
        self._drop_lines()
        self._pass("starts", setup_s, in_attempt=True)
        return self

    def steps(self, count, step_s=0.5, loss=3.0):
        self._pass("steps", count * step_s, in_attempt=True, step=self.step + count)
        for _ in range(count):
            self.step += 1
            values = {"loss/train_nats": loss, "optim/grad_norm": 1.0, "optim/lr": 0.001, "mem/peak_gib": 1.5}
            self._line(values | {"time/step_s": step_s})
        return self

    def validate(self, took_s, values=None):
        self._pass("validation", took_s, in_attempt=True, step=self.step)
        self._line(values or {"loss/valid_nats": 3.0})
        return self

    def save(self, stall_s=0.0):
        self.event("saved", step=self.step, bytes=10**9, seconds=stall_s)
        self._pass("checkpoints", stall_s, in_attempt=True)
        return self

    def fail(self, to_step, noticed_s=0.0):
        """End the launch; the next one continues from the checkpoint of `to_step`."""
        self._pass("repeated", noticed_s, in_attempt=True)
        self.event("failed", rank=1, name="node1", at="step", reason="an error", seen=[])
        self._lose(to_step)
        return self

    def roll_back(self, to_step, took_s=0.0, setup_s=0.0):
        self._pass("repeated", took_s, in_attempt=True)
        self.event("return", step=self.step, to_step=to_step, samples=[0, 8])
        self._lose(to_step)
        self._attempt += 1
        self._drop_lines()
        self._pass("repeated", setup_s, in_attempt=True)
        return self

    def stop(self, event="stop"):
        self._stopped.add(self._attempt)
        self.event(event, step=self.step, goodput=0.5)
        return self

    def event(self, name, /, **facts):
        self.events.append({"time": self.time_s, "event": name} | facts)
        return self

    def write(self):
        for name, lines in (("metrics.jsonl", self.lines), ("events.jsonl", self.events)):
            (self.run_dir / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return self.run_dir

    @property
    def seconds(self):
        """Seconds by part."""
        total = Counter()
        for part, seconds, *_ in self._ledger:
            total[part] += seconds
        return {part: seconds for part, seconds in total.items() if seconds}

    @property
    def has_trained(self):
        """True if the attempt has done a step."""
        return any(part == "steps" and attempt == self._attempt for part, _, attempt, _ in self._ledger)

    def _line(self, values):
        self.lines.append({"step": self.step, "tokens": self.step * 256, "time": self.time_s} | values)

    def _pass(self, part, seconds, in_attempt=False, step=None):
        self.time_s += seconds
        self._ledger.append([part, seconds, self._attempt if in_attempt else None, step])

    def _lose(self, to_step):
        """Count as repeated what each attempt did after its last line that is kept."""
        for attempt in range(1, self._attempt + 1):
            own = [entry for entry in self._ledger if entry[2] == attempt]
            kept = [n for n, (*_, step) in enumerate(own) if step is not None and step <= to_step]
            after = own[kept[-1] + 1 if kept else 0 :]
            if attempt in self._stopped and all(step is None for *_, step in after):
                continue  # it has lost nothing
            for entry in after:
                entry[0] = "repeated"
        self.step = to_step

    def _drop_lines(self):
        self.lines = [line for line in self.lines if line["step"] <= self.step]
