"""pretrain.py on a rank to which something happens; the environment says what.

SIGNAL=NAME:PLACE:RANK:COUNT:SECONDS:FILE   the rank gets a signal, such as SIGKILL, so many seconds after it has come
                                            to PLACE the COUNT-th time; a line in FILE says so
PLANT=KIND:RANK:FIRST:STOP[:once]           from sample FIRST up to STOP, KIND goes wrong on the rank: see PLANTS
READ=FOLDER                                 every rank writes down there which windows it reads for which step
"""

import functools
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import torch

import pretrain
from megatron_bipe.engine import start
from megatron_bipe.parallel import watchdog
from megatron_bipe.parallel.failure import run_rank
from megatron_bipe.train import feed as feeds
from tests.helpers.arithmetic_faults import Planted, plant, spoil_weight

SPIKE = 20.0


class Started:
    """The engine of this rank."""

    engine = None


PLANTS = {
    "data": lambda: setattr(Planted, "loss_factor", torch.nan),  # windows whose loss is NaN
    "spike": lambda: setattr(Planted, "loss_factor", SPIKE),
    "gradient": lambda: setattr(Planted, "gradient_factor", torch.nan),
    "weight": lambda: spoil_weight(Started.engine),
}


class FaultyFeed(feeds.Feed):
    """A feed that plants faults as steps are asked for."""

    _planted = False

    def train_batches(self, first_sample):
        Planted.nothing()
        if "PLANT" in os.environ:
            kind, rank, first, stop, *once = os.environ["PLANT"].split(":")
            here = self._mesh.rank == int(rank) and int(first) <= first_sample < int(stop)
            if here and not (once and self._planted):
                PLANTS[kind]()
                self._planted = True
        for batch in super().train_batches(first_sample):
            if "READ" in os.environ:
                self._write_down(first_sample)
            yield batch

    def _write_down(self, first_sample):
        path = f"{os.environ['READ']}/rank-{self._mesh.rank}-of-{self._mesh.num_ranks}.jsonl"
        with Path(path).open("a") as file:
            file.write(json.dumps([first_sample, np.asarray(Read.windows).tolist()]) + "\n")


class Read:
    """The windows of the last micro-batch."""

    windows = None


def _noted(make_batch):
    def noted(dataset, windows, *rest):
        Read.windows = windows
        return make_batch(dataset, windows, *rest)

    return noted


def _start_engine(start_engine):
    @functools.wraps(start_engine)
    def started(*arguments):
        Started.engine = start_engine(*arguments)
        plant(Started.engine)
        return Started.engine

    return started


class SignallingWatchdog(watchdog.Watchdog):
    """A watchdog that knows where this rank is to get a signal."""

    _count = 0

    def at(self, place):
        super().at(place)
        if "SIGNAL" not in os.environ:
            return
        name, wanted, rank, count, seconds, file = os.environ["SIGNAL"].split(":")
        if self._mesh.rank != int(rank):
            return
        # Where there is nothing to load yet, the first step will do.
        if place.startswith(wanted) or (wanted == "loading" and place.startswith("step")):
            self._count += 1
            if self._count == int(count):
                threading.Timer(float(seconds), self._send, (name, wanted, file)).start()

    def _send(self, name, wanted, file):
        with Path(file).open("a") as sent:
            sent.write(json.dumps({"place": wanted, "in": self._place, "rank": self._mesh.rank}) + "\n")
        os.kill(os.getpid(), signal.Signals[name])


if __name__ == "__main__":
    feeds.make_batch = _noted(feeds.make_batch)
    start.start_engine = _start_engine(start.start_engine)
    feeds.Feed, watchdog.Watchdog = FaultyFeed, SignallingWatchdog
    run_rank(pretrain.main, pretrain.parse_args())
