"""A stand-in for the parts of a training run."""

import torch

from megatron_bipe.checkpoint.find import find_checkpoint, step_folder
from megatron_bipe.engine.interface import StepResult
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.host_collectives import HostCollectives

MAIN = Mesh(0, 0, 1, 1, torch.device("cpu"))
NAN = float("nan")


class Notes:
    """Engine, batch loader and watchdog in one, which records all calls in order."""

    has_valid, host = True, HostCollectives(MAIN)

    def __init__(self, run_dir, bad_samples=()):
        self.calls, self.run_dir, self.bad_samples, self.loop_states = [], run_dir, bad_samples, {}
        self.in_validation = self.in_save = lambda: None

    @property
    def names(self):
        return [call[0] for call in self.calls]

    def of(self, name):
        return [call[1] for call in self.calls if call[0] == name]

    def train_step(self, first_sample, lr):
        self.calls.append(("step", first_sample, lr))
        return StepResult(NAN if first_sample in self.bad_samples else 2.0, 1.0)

    def eval_loss(self, batches):
        for number, _ in enumerate(batches):
            self.calls.append(("eval", number))
            self.in_validation()
        return 1.0

    def save(self, run_dir, step, *, loop_state, final):
        self.calls.append(("save", step, final))
        self.in_save()
        self.loop_states[step_folder(run_dir, step)] = loop_state
        step_folder(run_dir, step).mkdir(parents=True, exist_ok=True)

    def latest_valid_checkpoint(self, run_dir):
        return find_checkpoint(run_dir) if self.loop_states else None

    def load(self, folder):
        self.calls.append(("load", folder.name))
        return self.loop_states[folder]

    def observe(self, observer):
        pass

    def heartbeat(self):
        pass

    def pop_forward_seconds(self):
        return 0.1

    reading_time_s = pop_forward_seconds

    def train_batches(self, first_sample):
        return first_sample

    def valid_batches(self):
        return range(1)

    def sequences(self, first_sample):
        return torch.arange(first_sample, first_sample + 256)

    def mark(self, location):
        pass

    def track_batches(self, location, batches):
        return batches
