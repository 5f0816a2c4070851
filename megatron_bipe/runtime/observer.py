"""Receiver of what happens in work that takes long, such as the reading and writing of checkpoints."""

from collections.abc import Collection, Mapping


class Observer:
    """The interface, which ignores everything; all methods may be called by a background thread."""

    def progress(self) -> None:
        """Record that this rank or, where it waits for others, one of those has made progress."""

    def saved(self, step: int, num_bytes: int, seconds: float) -> None:
        """Record a published checkpoint; called on the main rank."""

    def steps_in_use(self) -> Collection[int]:
        """Return the steps of checkpoints that something reads, so that they are not deleted now."""
        return ()

    def save_failed(self, step: int, reason: str) -> None:
        """Record a checkpoint that could not be written; called on the main rank."""

    def fell_back(self, to_step: int, skipped: Mapping[int, str]) -> None:
        """Record that the checkpoint of `to_step` is used since newer ones, by step, cannot be; on the main rank."""
