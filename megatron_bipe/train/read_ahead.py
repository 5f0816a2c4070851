"""Batches that a thread reads in advance and prepares for a GPU, so that training does not wait for the file system.

The sequences of a micro-batch depend only on the number of samples consumed before. The thread therefore also reads the
first micro-batches of the next update, assuming that it begins where the current one ends.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_bipe.data.collate import for_transfer
from megatron_bipe.train.batch_loader import BatchLoader
from megatron_bipe.train.validation import Validation
from megatron_bipe.types import Batch, IntArray

_DEPTH = 2  # micro-batches in advance: one ready, and one being read


class ReadAhead:
    """Context manager with the methods of a `BatchLoader` that training needs, whose batches a thread reads in advance.

    An error of reading is raised in place of the batch that it concerns, after all batches before it. Batches that were
    read in advance but are not the next ones, as after a rollback, are dropped.

    Args:
        loader: source of the batches; only the thread reads from it, in the order of the requests.
        prepare: applied to every batch in the thread.
        initialize: called first in the thread.
    """

    def __init__(
        self,
        loader: BatchLoader,
        prepare: Callable[[Batch[Tensor]], Batch[Tensor]],
        initialize: Callable[[], object] = lambda: None,
    ) -> None:
        self._loader, self._prepare = loader, prepare
        self._thread = ThreadPoolExecutor(1, "batches", initializer=initialize)
        self._train = self._read(iter(()))
        self._next_sample: int | None = None  # first sample of the next batch in `_train`; None within an update
        self._waited_s = 0.0

    @property
    def has_valid(self) -> bool:
        return self._loader.has_valid

    @property
    def validations(self) -> list[Validation]:
        return self._loader.validations

    def sequences(self, first_sample: int) -> IntArray:
        return self._loader.sequences(first_sample)

    def train_batches(self, first_sample: int) -> Iterator[Batch[Tensor]]:
        """Yield the micro-batches of an update, as `BatchLoader.train_batches` does."""
        if self._next_sample != first_sample:
            self._train = self._read(self._endless_batches(first_sample))
        self._next_sample = None
        last = self._loader.num_micro_batches - 1
        for number in range(last + 1):
            began_s = time.perf_counter()
            with record_function("data"):
                batch = self._verified(next(self._train))
            self._waited_s += time.perf_counter() - began_s
            if number == last:  # the engine may not resume this function after the last batch
                self._next_sample = first_sample + self._loader.global_batch
            yield batch

    def valid_batches(self, validation: Validation) -> Iterator[Batch[Tensor]]:
        """Yield the batches of a validation, as `BatchLoader.valid_batches` does."""
        yield from map(self._verified, self._read(self._loader.valid_batches(validation)))

    def reading_time_s(self) -> float:
        """Return the seconds that training has waited for batches since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the report does not wait for a read, which may hang; the thread ends after it.
        self._thread.shutdown(wait=error is None, cancel_futures=True)

    def _read(self, batches: Iterator[Batch[Tensor]]) -> "_BatchesAhead":
        return _BatchesAhead(self._thread, map(self._prepare, batches))

    def _endless_batches(self, first_sample: int) -> Iterator[Batch[Tensor]]:
        for sample in count(first_sample, self._loader.global_batch):
            yield from self._loader.train_batches(sample)

    def _verified(self, batch: Batch[Tensor]) -> Batch[Tensor]:
        """Return the batch unless a damaged file was found since it was read."""
        self._loader.checking_shards().raise_if_failed()
        return batch


class _BatchesAhead(Iterator[Batch[Tensor]]):
    """Iterator whose next elements the thread computes in advance; it starts at the first request."""

    def __init__(self, thread: ThreadPoolExecutor, batches: Iterator[Batch[Tensor]]) -> None:
        self._thread, self._batches = thread, batches
        self._pending: deque[Future[Batch[Tensor]]] = deque()

    def __next__(self) -> Batch[Tensor]:
        while len(self._pending) <= _DEPTH:
            self._pending.append(self._thread.submit(next, self._batches))
        return self._pending.popleft().result()


Loader = BatchLoader | ReadAhead  # source of training and validation batches


@contextmanager
def reading_ahead(loader: BatchLoader, device: torch.device) -> Iterator[Loader]:
    """Yield the source of batches for a device: on a GPU they are read in advance, on a CPU when they are requested."""
    if device.type != "cuda":
        yield loader
        return
    with ReadAhead(loader, for_transfer, partial(torch.cuda.set_device, device)) as batches:
        yield batches
