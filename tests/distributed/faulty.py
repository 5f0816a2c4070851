"""pretrain.py with a rank that does not go on; FAULT=KIND:RANK:STEP in the environment says which."""

import os
import signal

import pretrain
from megatron_bipe.parallel.failure import run_rank
from megatron_bipe.train import feed


def _raise():
    raise ValueError("a fault was asked for")


def _spin():
    while True:
        pass


FAULTS = {
    "raise": _raise,
    "spin": _spin,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


class FaultyFeed(feed.Feed):
    """A feed that does what FAULT says when the step is asked for, on the rank it names."""

    def train_batches(self, first_sample):
        kind, rank, at = os.environ["FAULT"].split(":")
        step = first_sample // self._train.global_batch + 1
        for batch in super().train_batches(first_sample):
            if self._mesh.rank == int(rank) and step == int(at):
                FAULTS[kind]()
            yield batch


if __name__ == "__main__":
    feed.Feed = FaultyFeed
    run_rank(pretrain.main, pretrain.parse_args())
