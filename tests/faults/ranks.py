"""pretrain.py on a rank to which something happens; the environment says what.

KILL=PLACE:RANK:COUNT:SECONDS:FILE   the rank kills itself (SIGKILL) so many seconds after it has come to PLACE the
                                     COUNT-th time; a line in FILE says so
SIGNAL=NAME:RANK:STEP:SECONDS        the rank gets a signal, such as SIGTERM, so long after it began STEP
PLANT=KIND:RANK:FIRST:STOP           from sample FIRST up to STOP, KIND goes wrong on the rank: see PLANTS
READ=FOLDER                          every rank writes down there which windows it reads for which step
"""

import functools
import json
import os
import signal
import threading

import numpy as np
import torch

import pretrain
from megatron_bipe.engine import pipeline, zero
from megatron_bipe.parallel.failure import run_rank
from megatron_bipe.parallel.watchdog import Watchdog
from megatron_bipe.train import feed as feeds
from megatron_bipe.train.feed import Feed

SPIKE = 20.0


class Planted:
    """What is wrong with the step under way."""

    loss_factor = 1.0
    gradient = False
    engine = None


def _spoil_weight():
    weight = next(p for p in Planted.engine._engine.module.parameters() if p.ndim > 1)
    weight.data.view(-1)[5] = torch.nan


PLANTS = {
    "data": lambda: setattr(Planted, "loss_factor", torch.nan),  # windows whose loss is NaN
    "spike": lambda: setattr(Planted, "loss_factor", SPIKE),
    "gradient": lambda: setattr(Planted, "gradient", True),
    "weight": _spoil_weight,
}


class FaultyFeed(Feed):
    """A feed that plants faults, and sends signals, as steps are asked for."""

    def train_batches(self, first_sample):
        Planted.loss_factor, Planted.gradient = 1.0, False
        if "PLANT" in os.environ:
            kind, rank, first, stop = os.environ["PLANT"].split(":")
            if self._mesh.rank == int(rank) and int(first) <= first_sample < int(stop):
                PLANTS[kind]()
        if "SIGNAL" in os.environ:
            name, rank, step, seconds = os.environ["SIGNAL"].split(":")
            if self._mesh.rank == int(rank) and first_sample == (int(step) - 1) * self._train.global_batch:
                threading.Timer(float(seconds), os.kill, (os.getpid(), signal.Signals[name])).start()
        for batch in super().train_batches(first_sample):
            if "READ" in os.environ:
                self._write_down(first_sample)
            yield batch

    def _write_down(self, first_sample):
        path = f"{os.environ['READ']}/rank-{self._mesh.rank}-of-{self._mesh.num_ranks}.jsonl"
        with open(path, "a") as file:
            file.write(json.dumps([first_sample, np.asarray(Read.windows).tolist()]) + "\n")


class Read:
    """The windows of the last micro-batch."""

    windows = None


def _noted(make_batch):
    def noted(dataset, windows, *rest):
        Read.windows = windows
        return make_batch(dataset, windows, *rest)

    return noted


def _planted(mean_loss):
    return lambda losses_BT: mean_loss(losses_BT * Planted.loss_factor)


def _start_engine(start_engine):
    @functools.wraps(start_engine)
    def started(*arguments):
        Planted.engine = start_engine(*arguments)
        weight = next(p for p in Planted.engine._engine.module.parameters() if p.ndim > 1)
        weight.register_hook(lambda gradient: gradient * (torch.nan if Planted.gradient else 1.0))
        return Planted.engine

    return started


class KillingWatchdog(Watchdog):
    """A watchdog that knows where it is to end."""

    _count = 0

    def at(self, place):
        super().at(place)
        if "KILL" not in os.environ:
            return
        wanted, rank, count, seconds, file = os.environ["KILL"].split(":")
        if self._mesh.rank != int(rank):
            return
        # Where there is nothing to load yet, the first step will do.
        if place.startswith(wanted) or (wanted == "loading" and place.startswith("step")):
            self._count += 1
            if self._count == int(count):
                threading.Timer(float(seconds), self._kill, (wanted, file)).start()

    def _kill(self, wanted, file):
        with open(file, "a") as killed:
            killed.write(json.dumps({"place": wanted, "in": self._place, "rank": self._mesh.rank}) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    feeds.make_batch = _noted(feeds.make_batch)
    zero.mean_loss, pipeline.mean_loss = _planted(zero.mean_loss), _planted(pipeline.mean_loss)
    pretrain.start_engine = _start_engine(pretrain.start_engine)
    pretrain.Feed, pretrain.Watchdog = FaultyFeed, KillingWatchdog
    run_rank(pretrain.main, pretrain.parse_args())
