"""A stand-in for the parts of a training run."""

import threading
from types import SimpleNamespace

import torch

from megatron_bipe.checkpoint.find import find_checkpoint, step_folder
from megatron_bipe.engine.interface import LossSums, StepResult
from megatron_bipe.errors import DataError
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.train.validation import Validation
from megatron_bipe.types import Batch

MAIN = Mesh(0, 0, 1, 1, torch.device("cpu"))
NAN = float("nan")


class Notes:
    """Engine, batch loader and watchdog in one, which records all calls in order."""

    has_valid, host = True, HostCollectives(MAIN)
    validations = (Validation("valid", 1024, None, None),)

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
        return LossSums([1.0] * 16, [1.0] * 16)

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

    def finish_save(self):
        pass

    def heartbeat(self):
        pass

    def pop_forward_seconds(self):
        return 0.1

    reading_time_s = pop_forward_seconds

    def train_batches(self, first_sample):
        return first_sample

    def valid_batches(self, validation):
        return range(1)

    def sequences(self, first_sample):
        return torch.arange(first_sample, first_sample + 256)

    def mark(self, location):
        pass

    def track_batches(self, location, batches):
        return batches


class NumberedBatches:
    """Batch loader whose batches consist of the number of their first sample, and which records its reads."""

    has_valid, num_valid = True, 3
    validations = (Validation("valid", 4, None, None),)

    def __init__(self, global_batch=6, num_micro_batches=3):
        self.global_batch, self.num_micro_batches = global_batch, num_micro_batches
        self.reads, self.threads, self.num_valid_read = [], set(), 0
        self.error_at = self.damage = None
        self.gate, self._changed = threading.Event(), threading.Condition()
        self.gate.set()

    def train_batches(self, first_sample):
        step = self.global_batch // self.num_micro_batches
        for sample in range(first_sample, first_sample + self.global_batch, step):
            yield self._batch(sample)

    def valid_batches(self, validation):
        assert validation in self.validations
        for number in range(self.num_valid):
            self.num_valid_read += 1
            yield self._batch(1000 + number)

    def sequences(self, first_sample):
        return torch.arange(first_sample, first_sample + self.global_batch)

    def checking_shards(self):
        return SimpleNamespace(raise_if_failed=self._raise_if_failed)

    def wait_for_reads(self, count):
        """Wait until a number of batches have been read or begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.reads) >= count, 20)

    def _batch(self, sample):
        with self._changed:
            self.reads.append(sample)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
        assert self.gate.wait(20)
        if sample == self.error_at:
            raise DataError(f"sample {sample} cannot be read", remedy="Copy the shard again", location="shard")
        return Batch(*(torch.full((2, 4), sample) for _ in range(4)), torch.ones(2, 4))

    def _raise_if_failed(self):
        if self.damage is not None:
            raise self.damage
