"""Host memory for one copy of a rank's training state.

On a GPU the memory is page-locked, so that copies run in the background of training. Page-locking gigabytes takes
seconds, so it is done once, at the start of a run. The memory is allocated as ordinary memory and then registered with
CUDA, because torch's own allocator of pinned memory rounds every size up to a power of two.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megatron_bipe.checkpoint.shard_files import Fragment

_log = logging.getLogger(__name__)


class StagingBuffer:
    """One flat fp32 tensor, reused by all saves; only one thread calls `reserve`, `take` and `release`.

    Args:
        device: device of the state. For a GPU the memory is pinned, and copies run on a separate stream; the calling
            thread must have selected this device, or CUDA would use memory of the first GPU as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._flat = torch.empty(0)
        self._unregister: Callable[[], object] = lambda: None
        self._is_refused = False  # True after the memory could not be allocated

    @property
    def is_pinned(self) -> bool:
        """True if there is memory to which a GPU copies faster than to any other."""
        return self._stream is not None and self._flat.numel() > 0

    def mark(self) -> torch.cuda.Event | None:
        """Record the event that `take` must wait for on a GPU: all work that this thread has queued so far."""
        return torch.cuda.current_stream().record_event() if self._stream else None

    def reserve(self, num_elements: int) -> bool:
        """Allocate memory for this many elements, unless it exists. Return False if it is too small, once warned of."""
        if self._is_refused or num_elements <= self._flat.numel():
            return not self._is_refused
        try:
            self.release()
            self._flat = self._allocated(num_elements)
        except (RuntimeError, MemoryError) as error:
            self._is_refused = True
            what = "pinned host memory" if self._stream else "host memory"
            _log.warning(
                "%.2f GB of %s for copies of the training state could not be allocated: %s. Training waits while a "
                "checkpoint is written. Set checkpoint.asynchronous=false, which needs no copy, or use more ranks or a "
                "ZeRO stage, which divide it",
                num_elements * self._flat.itemsize / 1e9,
                what,
                str(error).partition("\n")[0],
            )
        return not self._is_refused

    def take(self, fragments: Sequence[Fragment], mark: torch.cuda.Event | None) -> list[Fragment] | None:
        """Return copies of the fragments once they are complete, or None if the memory for them cannot be allocated.

        They remain valid until the next call.
        """
        if not self.reserve(num_elements(fragments)):
            return None
        copies, start = [], 0
        with torch.cuda.stream(self._stream):  # no effect if it is None
            if self._stream and mark:
                self._stream.wait_event(mark)
            for fragment in fragments:
                state = {}
                for kind, x in fragment.state.items():
                    state[kind] = self._flat[start : start + x.numel()].copy_(x, non_blocking=True)
                    start += x.numel()
                copies.append(fragment._replace(state=state))
        if self._stream:
            self._stream.synchronize()
        return copies

    def release(self) -> None:
        """Free the memory; copies are no longer valid."""
        self._flat = torch.empty(0)
        self._unregister()

    def _allocated(self, num_elements: int) -> Tensor:
        flat = torch.empty(num_elements)
        if self._stream:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
            # Of a buffer that is dropped without `release`, too: CUDA would access the freed memory when it is reused.
            self._unregister = unregister = weakref.finalize(self, _unregister, flat)
            unregister.atexit = False  # the driver does it when the process ends
        return flat


def _unregister(flat: Tensor) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(flat.data_ptr()))


def num_elements(fragments: Iterable[Fragment]) -> int:
    """Return the number of elements of all tensors of some fragments."""
    return sum(x.numel() for fragment in fragments for x in fragment.state.values())
