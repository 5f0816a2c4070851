"""A copy of the training state in the host's memory, for a writer that works while training goes on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bipe.checkpoint.shard_files import Fragment


class StagingBuffer:
    """Room for one copy of a rank's state. It is kept, since the first use of memory costs more than the copy.

    Args:
        device: where the state lies; of a GPU, the room is pinned and the copy has a stream of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._room: dict[str, Tensor] = {}

    def mark(self) -> torch.cuda.Event | None:
        """What `take` is to wait for on a GPU: all that this thread has asked of it so far."""
        return torch.cuda.current_stream().record_event() if self._stream else None

    def take(self, fragments: Sequence[Fragment], mark: torch.cuda.Event | None) -> list[Fragment]:
        """The fragments as they are, copied; done when this returns. The copy stays until the next call."""
        with torch.cuda.stream(self._stream):  # without one, nothing
            if self._stream and mark:
                self._stream.wait_event(mark)
            copies = [fragment._replace(state=self._copied(fragment)) for fragment in fragments]
        if self._stream:
            self._stream.synchronize()
        return copies

    def _copied(self, fragment: Fragment) -> dict[str, Tensor]:
        return {kind: self._into_room(f"{fragment.name}:{kind}", x) for kind, x in fragment.state.items()}

    def _into_room(self, key: str, x: Tensor) -> Tensor:
        room = self._room.get(key)
        if room is None or room.shape != x.shape:
            room = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None)
            self._room[key] = room
        return room.copy_(x, non_blocking=True)
