"""A buffer in host memory for a copy of the training state, which is written while training continues."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bipe.checkpoint.shard_files import Fragment


class StagingBuffer:
    """A buffer for one copy of a rank's state, which is reused because allocating costs more than copying.

    Args:
        device: device of the state. For a GPU the buffer is pinned, and copies run on a separate stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}

    def mark(self) -> torch.cuda.Event | None:
        """Record the event that `take` must wait for on a GPU: all work that this thread has queued so far."""
        return torch.cuda.current_stream().record_event() if self._stream else None

    def take(self, fragments: Sequence[Fragment], mark: torch.cuda.Event | None) -> list[Fragment]:
        """Copy the fragments, and return when the copy is complete. It remains valid until the next call."""
        with torch.cuda.stream(self._stream):  # no effect if it is None
            if self._stream and mark:
                self._stream.wait_event(mark)
            copies = [fragment._replace(state=self._copied(fragment)) for fragment in fragments]
        if self._stream:
            self._stream.synchronize()
        return copies

    def _copied(self, fragment: Fragment) -> dict[str, Tensor]:
        return {kind: self._into_buffer(f"{fragment.name}:{kind}", x) for kind, x in fragment.state.items()}

    def _into_buffer(self, key: str, x: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != x.shape:
            buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None)
            self._buffers[key] = buffer
        return buffer.copy_(x, non_blocking=True)
