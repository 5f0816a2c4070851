"""Whole runs inside the processes of one spawn, one after the other: what a launch does, without the launcher."""

from pathlib import Path
from typing import Any, NamedTuple

from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.validate import validate_run
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.train.feed import Feed
from tests.helpers.arithmetic_faults import Planted, plant, spoil_weight
from tests.helpers.commands import options
from tests.helpers.paths import DS_CONFIGS


class Plant(NamedTuple):
    """What goes wrong on a rank, from one sample up to another."""

    kind: str
    rank: int
    first: int
    stop: int
    once: bool = False


class NotingFeed(Feed):
    """A feed that plants a fault, and notes which windows it was asked for."""

    plant: Plant | None = None
    engine: Any = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.read: dict[int, list[int]] = {}  # by first sample of the step: windows of this rank
        self._done = False

    def train_batches(self, first_sample: int) -> Any:
        Planted.nothing()
        fault = self.plant
        if fault and self._mesh.rank == fault.rank and fault.first <= first_sample < fault.stop:
            if not (fault.once and self._done):
                self._begin(fault.kind)
            self._done = True
        self.read[first_sample] = []
        for batch in super().train_batches(first_sample):
            self.read[first_sample].append(batch.tokens_BT.tolist())
            yield batch

    def _begin(self, kind: str) -> None:
        if kind == "weight":
            spoil_weight(self.engine)
        else:
            field, value = {
                "data": ("loss_factor", float("nan")),  # windows whose loss is NaN
                "spike": ("loss_factor", 20.0),
                "gradient": ("gradient_factor", float("nan")),
            }[kind]
            setattr(Planted, field, value)


class StillWatchdog:
    """In place of one that would end the process."""

    def at(self, place: str) -> None:
        pass

    def still_there(self) -> None:
        pass

    def over(self, place: str, items: Any) -> Any:
        return items


def train_inside(
    mesh: Mesh,
    data: str,
    run_dir: str,
    settings: tuple[str, ...],
    zero: int,
    steps: int,
    stop: int,
    fault: Plant | None,
) -> dict[int, list[list[int]]]:
    """Start or continue a run, up to `stop`; the tokens that this rank read, by first sample of the step."""
    from megatron_bipe.engine.start import start_engine
    from megatron_bipe.train.profile import Profile
    from megatron_bipe.train.session import go_on
    from megatron_bipe.train.stopping import StopRequest

    given = options(Path(data) / "train", Path(run_dir), *settings, steps=steps)[1::2]
    run = load_run_config(None, given)
    laid_out = mesh.laid_out(run.parallel)
    validate_run(run, mesh.num_ranks)
    path = DS_CONFIGS / f"zero{zero}.json"
    engine = start_engine(run, engine_config(run, read_ds_config(path), mesh.num_ranks, path), laid_out)
    plant(engine)
    feed = NotingFeed(run, laid_out)
    feed.plant, feed.engine = fault, engine
    run.run_dir.mkdir(parents=True, exist_ok=True)
    assert go_on(run, laid_out, engine, feed, StillWatchdog(), StopRequest(), stop, Profile(0, run.run_dir, laid_out))  # type: ignore[arg-type]
    Planted.nothing()
    return feed.read
