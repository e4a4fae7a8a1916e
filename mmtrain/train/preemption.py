"""Signals and time limits that stop a run early. The train loop reads them between steps. Does not import torch."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Context manager that records SIGTERM, SIGINT or SIGUSR2 instead of ending the process.

    Only the first signal is recorded; a second one has its usual effect. A caller may enter a request before it creates
    the trainer: the trainer then uses that request (:meth:`current`).

    Args:
        seconds: time limit. After it, ``received`` is SIGALRM although no signal was sent. None: no limit.
    """

    _listening: StopRequest | None = None

    def __init__(self, seconds: float | None = None) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._deadline = time.monotonic() + seconds if seconds is not None else None
        self._entered = 0

    @classmethod
    def current(cls) -> StopRequest:
        """Return the request whose signal handlers are installed, or a new one."""
        return cls._listening or cls()

    @property
    def received(self) -> signal.Signals | None:
        """The first signal received, SIGALRM after the time limit, or None."""
        if self._signal is None and self._deadline is not None and time.monotonic() > self._deadline:
            return signal.SIGALRM
        return self._signal

    @property
    def requested(self) -> bool:
        """True if the run must save and stop."""
        return self.received is not None

    def __enter__(self) -> StopRequest:
        self._entered += 1
        if self._entered == 1 and threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
            StopRequest._listening = self
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):  # type: ignore[no-untyped-def]
        self._entered -= 1
        if not self._entered:
            self._restore()
            StopRequest._listening = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)  # type: ignore[arg-type]
        self._before = {}
