"""Measure the phases of a step: data, forward, backward, optimizer, communication, and other.

On a CPU, a boundary between two phases is a reading of the clock. On a GPU, it is an event in the current stream, so
the time is measured when the GPU reaches it. Queued work counts in the phase that queued it. A wait for data does not
count while the GPU is still busy. The events are read once per window, so no step waits for the GPU.
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
    """Source of time marks that are cheap to set and are read later."""

    def now(self) -> Any:
        """Set and return a time mark."""

    def gaps(self, marks: list[Any]) -> list[float]:
        """Return the seconds between successive marks. The marks must not be used afterwards."""


class HostClock:
    """Time marks from the clock of the CPU."""

    def now(self) -> float:
        return time.perf_counter()

    def gaps(self, marks: list[float]) -> list[float]:
        return [after - before for before, after in pairwise(marks)]


class CudaClock:
    """Time marks as CUDA events in the current stream of ``device``. Events are reused after they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def gaps(self, marks: list[torch.cuda.Event]) -> list[float]:
        marks[-1].synchronize()
        gaps = [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]
        self._free += marks
        return gaps


#: The phases of a step. Time outside them counts as "other".
PHASES = ("data", "forward", "backward", "optimizer", "communication")

#: Number of time marks that are kept before they are summed up, if no window ends earlier (about 300 steps).
_MAX_MARKS = 4096
_OTHER, _PAUSED = "other", ""


@dataclass(frozen=True)
class Timings:
    """Mean seconds per step over ``steps`` steps. ``total`` is the sum of the phases and ``other``."""

    steps: int
    total: float
    data: float
    forward: float
    backward: float
    optimizer: float
    communication: float
    other: float

    def busy(self, gathers: bool = False) -> float:
        """Return the seconds per step that this rank did not wait for others. Used to find slow ranks.

        Args:
            gathers: forward and backward passes include waiting for other ranks (fsdp, hsdp, zero3). They then take
                equally long on every rank, so only ``data`` and ``other`` are counted.
        """
        return self.data + self.other if gathers else self.total - self.communication

    def speed(self, batch_size: int, world: int) -> dict[str, float]:
        """Return the throughput in samples per second: of all ranks together, and per rank.

        Args:
            batch_size: the global batch.
            world: number of ranks.
        """
        every = batch_size / self.total if self.total > 0 else 0.0
        return {"samples_per_second": every, "samples_per_second_per_rank": every / world}

    def line(self) -> dict[str, float]:
        """Return metrics: ``step_seconds``, and ``<phase>_seconds`` for each phase."""
        seconds = {f"{name}_seconds": value for name, value in asdict(self).items() if name not in ("steps", "total")}
        return {"step_seconds": self.total, **seconds}


class _Phase:
    """Context manager of one phase. It is reusable, since the timer stores which phases are open."""

    def __init__(self, timer: StepTimer, name: str) -> None:
        self.timer, self.name = timer, name

    def __enter__(self) -> None:
        self.timer._enter(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.timer._leave()


class StepTimer:
    """Measures the time of steps by phase. The clock runs from the construction on.

    Time counts only in the innermost open phase, so the phases and "other" add up to the total.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or (CudaClock(device) if device.type == "cuda" else HostClock())
        self._phases = {name: _Phase(self, name) for name in (*PHASES, _PAUSED)}
        self._open: list[str] = []
        self._start()

    def phase(self, name: str) -> _Phase:
        """Return a context manager that counts time in phase ``name``, one of :data:`PHASES`.

        Phases can be nested. The time of an inner phase does not count in the outer one.
        """
        if name not in PHASES:
            raise ValueError(f"unknown phase '{name}'. Use one of {', '.join(PHASES)}")
        return self._phases[name]

    def paused(self) -> _Phase:
        """Return a context manager whose time is not counted, for evaluations and saves between steps."""
        return self._phases[_PAUSED]

    def end_step(self) -> None:
        """Count one step as finished."""
        self._steps += 1
        if len(self._marks) > _MAX_MARKS:
            self._sum_up()

    def window(self) -> Timings:
        """Return the means over the steps since the last call, and begin a new window.

        On a GPU this waits until the steps are finished. Call it after :meth:`end_step`: the time of an unfinished step
        would count for the steps before it.
        """
        self._sum_up()
        spent = {name: self._spent[name] / max(self._steps, 1) for name in (*PHASES, _OTHER)}
        timings = Timings(steps=self._steps, total=sum(spent.values()), **spent)
        self._start()
        return timings

    def _start(self) -> None:
        """Begin a new window."""
        self._spent = dict.fromkeys((*PHASES, _OTHER, _PAUSED), 0.0)
        self._steps = 0
        self._names: list[str] = []
        self._marks: list[Any] = [self.clock.now()]

    def _enter(self, name: str) -> None:
        self._mark()
        self._open.append(name)

    def _leave(self) -> None:
        self._mark()
        self._open.pop()

    def _mark(self) -> None:
        """Set a time mark. The time since the previous mark belongs to the phase that is open now."""
        self._names.append(self._open[-1] if self._open else _OTHER)
        self._marks.append(self.clock.now())

    def _sum_up(self) -> None:
        self._mark()
        for name, seconds in zip(self._names, self.clock.gaps(self._marks), strict=True):
            self._spent[name] += seconds
        self._names, self._marks = [], [self.clock.now()]


@contextmanager
def exposed_reduction(loss: torch.Tensor, timer: StepTimer) -> Iterator[None]:
    """Count the wait for gradient reduction at the end of ``loss.backward()`` as "communication".

    Use it around ``loss.backward()`` within the backward phase. DDP and FSDP2 reduce gradients during the backward
    pass. They wait for the remaining reductions in a callback of the autograd engine, which runs callbacks after the
    graph, in the order of registration. A hook of the loss runs first in a backward pass, so the callback registered
    there precedes theirs. The time from that callback to the end of the ``with`` block is the part of the reduction
    that computation did not hide.

    Waits while the graph runs stay in the forward and backward phases: the gathers of FSDP2 and, on a CPU, where
    collectives block, all its reductions except the one of the root module. Under FSDP2 a slow rank therefore lengthens
    the forward and backward phases of the others.
    """
    begun = False

    def after_graph() -> None:
        nonlocal begun
        begun = True
        timer._enter("communication")

    def queue(_: torch.Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(after_graph)

    handle = loss.register_hook(queue)
    try:
        yield
    finally:
        handle.remove()
        if begun:
            timer._leave()
