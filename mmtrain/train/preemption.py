"""Signals and time limits that ask a run to save and leave; the loop looks at a flag between steps. Needs no torch."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """``received`` is the first signal that came, or None. A second one takes its default course.

    Whoever starts a run may listen before the trainer is there: the trainer joins the one that listens.

    Args:
        seconds: after so many the request counts as received (SIGALRM): a time limit that nobody announces.
    """

    _listening: StopRequest | None = None

    def __init__(self, seconds: float | None = None) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._deadline = time.monotonic() + seconds if seconds is not None else None
        self._entered = 0

    @classmethod
    def current(cls) -> StopRequest:
        """The one that listens already, or a new one."""
        return cls._listening or cls()

    @property
    def received(self) -> signal.Signals | None:
        if self._signal is None and self._deadline is not None and time.monotonic() > self._deadline:
            return signal.SIGALRM
        return self._signal

    @property
    def requested(self) -> bool:
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
