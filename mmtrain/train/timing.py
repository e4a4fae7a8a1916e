"""Where the time of a step goes: data, forward, backward, optimizer, communication, and the rest.

On a CPU the border between two phases is a reading of the clock. On a GPU it is an event put into the stream, so what
is measured is when the GPU came past it: work that the CPU only queued is counted where it runs, and a wait for data
that the GPU did not notice, being busy still, counts as nothing. The events are read once a window: no step waits for
the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Borders in time, cheap to set and read later."""

    def now(self) -> Any:
        """A border."""

    def gaps(self, borders: list[Any]) -> list[float]:
        """Seconds between each border and the next; the borders are not used again."""


class HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def gaps(self, borders: list[float]) -> list[float]:
        return [after - before for before, after in pairwise(borders)]


class CudaClock:
    """Events in the current stream of ``device``, used again once they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def gaps(self, borders: list[torch.cuda.Event]) -> list[float]:
        borders[-1].synchronize()
        gaps = [before.elapsed_time(after) / 1000 for before, after in pairwise(borders)]
        self._free += borders
        return gaps


#: The phases of a step; what is in none of them is "other".
PHASES = ("data", "forward", "backward", "optimizer", "communication")

#: So many borders are kept before they are summed up, should nobody ask for a window (about 300 steps).
_MOST_BORDERS = 4096
_OTHER, _PAUSED = "other", ""


@dataclass(frozen=True)
class Timings:
    """Means over ``steps`` steps, in seconds a step. ``total`` is the sum of the phases and ``other``."""

    steps: int
    total: float
    data: float
    forward: float
    backward: float
    optimizer: float
    communication: float
    other: float

    def busy(self, gathers: bool = False) -> float:
        """Seconds a step that this rank did not spend waiting for the others: what to compare among ranks.

        Args:
            gathers: the passes wait for other ranks too (fsdp, hsdp, zero3). Then they take as long on every rank, and
                only a rank that is slow between them, at its data above all, can be told: data and other are counted.
        """
        return self.data + self.other if gathers else self.total - self.communication

    def speed(self, batch_size: int, world: int) -> dict[str, float]:
        """Samples a second of all ranks, whose step takes ``batch_size`` samples, and of each of ``world`` ranks."""
        every = batch_size / self.total if self.total > 0 else 0.0
        return {"samples_per_second": every, "samples_per_second_per_rank": every / world}

    def line(self) -> dict[str, float]:
        """For a line of metrics: ``step_seconds``, and ``<phase>_seconds`` of each phase."""
        seconds = {f"{name}_seconds": value for name, value in asdict(self).items() if name not in ("steps", "total")}
        return {"step_seconds": self.total, **seconds}


class _Phase:
    """``with`` a phase; one object serves every time, since what is open is kept by the timer."""

    def __init__(self, timer: StepTimer, name: str) -> None:
        self.timer, self.name = timer, name

    def __enter__(self) -> None:
        self.timer._enter(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.timer._leave()


class StepTimer:
    """Splits the time of steps into phases. Made, and given back by :meth:`window`, with the clock running.

    Each moment counts in the innermost open phase alone, so the parts add up to the total.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or (CudaClock(device) if device.type == "cuda" else HostClock())
        self._phases = {name: _Phase(self, name) for name in (*PHASES, _PAUSED)}
        self._open: list[str] = []
        self._start()

    def phase(self, name: str) -> _Phase:
        """``with timer.phase("forward"):``; one of :data:`PHASES`. An inner phase's time is not the outer's."""
        if name not in PHASES:
            raise ValueError(f"phase '{name}' is none of {', '.join(PHASES)}")
        return self._phases[name]

    def paused(self) -> _Phase:
        """``with timer.paused():`` evaluation or a checkpoint between two steps: counted nowhere, in no total."""
        return self._phases[_PAUSED]

    def end_step(self) -> None:
        """A step is done."""
        self._steps += 1
        if len(self._borders) > _MOST_BORDERS:
            self._sum_up()

    def window(self) -> Timings:
        """The means over the steps since the last call, and begin anew. On a GPU this waits for the steps to be done.

        Call it after :meth:`end_step`: the time of a step under way would count for those before it.
        """
        self._sum_up()
        spent = {name: self._spent[name] / max(self._steps, 1) for name in (*PHASES, _OTHER)}
        timings = Timings(steps=self._steps, total=sum(spent.values()), **spent)
        self._start()
        return timings

    def _start(self) -> None:
        """Begin a window."""
        self._spent = dict.fromkeys((*PHASES, _OTHER, _PAUSED), 0.0)
        self._steps = 0
        self._names: list[str] = []
        self._borders: list[Any] = [self.clock.now()]

    def _enter(self, name: str) -> None:
        self._border()
        self._open.append(name)

    def _leave(self) -> None:
        self._border()
        self._open.pop()

    def _border(self) -> None:
        """The time since the last border was of the phase that is open now."""
        self._names.append(self._open[-1] if self._open else _OTHER)
        self._borders.append(self.clock.now())

    def _sum_up(self) -> None:
        self._border()
        for name, seconds in zip(self._names, self.clock.gaps(self._borders), strict=True):
            self._spent[name] += seconds
        self._names, self._borders = [], [self.clock.now()]


@contextmanager
def exposed_reduction(loss: torch.Tensor, timer: StepTimer) -> Iterator[None]:
    """Around ``loss.backward()``, inside the backward phase: count the wait for the gradients' reduction apart.

    DDP and FSDP2 reduce gradients while the backward pass goes on, and wait for the rest in a callback that they queue
    on the autograd engine, which runs the callbacks when the graph is done, in the order in which they were queued. The
    hook of the loss is the first thing of a backward pass, so our callback comes before theirs: from it to the end of
    the ``with`` block is the part of the reduction that computing did not hide, and is counted as "communication".

    What this leaves in the forward and backward phases: the gathers of FSDP2; on a CPU, where its collectives block,
    all of its reductions but the root's own; and whatever else is waited for while the graph runs. So under FSDP2 a
    slow rank makes the others' forward and backward longer, and only the tail of the reduction is communication.
    """
    begun = False

    def graph_is_done() -> None:
        nonlocal begun
        begun = True
        timer._enter("communication")

    def first(_: torch.Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(graph_is_done)

    handle = loss.register_hook(first)
    try:
        yield
    finally:
        handle.remove()
        if begun:
            timer._leave()
