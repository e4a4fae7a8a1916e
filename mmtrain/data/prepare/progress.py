"""A progress bar on a terminal, a line for every tenth or minute elsewhere (log files)."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_PAUSE = 60.0  # seconds


class Advance(Protocol):
    def __call__(self, count: int, *, fresh: bool = True) -> None:
        """``count`` more are done; not ``fresh``: they were done before, and say nothing about the rate."""
        ...


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Yields ``advance(count)``; shows the rate and the time left."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        rate = TextColumn("{task.fields[rate]}")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, rate="")
            meter = _Meter(title, total)

            def show(count: int, *, fresh: bool = True) -> None:
                meter.count(count, fresh)
                bar.update(task, advance=count, rate=f"{meter.rate:.0f}/s" if meter.rate else "")

            yield show
        return
    meter = _Meter(title, total)

    def advance(count: int, *, fresh: bool = True) -> None:
        before = meter.done
        meter.count(count, fresh)
        now = time.monotonic()
        tenth = total and before * 10 // total != meter.done * 10 // total
        if tenth or now - meter.said > _PAUSE:
            meter.said = now
            logging.getLogger("mmtrain").info("%s", meter)

    yield advance


class _Meter:
    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.done = self.fresh = 0
        self.began = self.said = time.monotonic()

    def count(self, count: int, fresh: bool) -> None:
        self.done += count
        if fresh:
            self.fresh += count
        elif not self.fresh:
            self.began = time.monotonic()

    @property
    def rate(self) -> float:
        """Fresh ones a second; 0 before the first."""
        return self.fresh / max(time.monotonic() - self.began, 1e-6)

    def __str__(self) -> str:
        text = f"{self.title}: {self.done} of {self.total}"
        if not self.fresh or self.done >= self.total:
            return text
        left = int((self.total - self.done) / self.rate)
        shown = f"{left // 3600} h {left % 3600 // 60} min" if left >= 3600 else f"{left // 60} min {left % 60} s"
        return f"{text}, {self.rate:.0f}/s, {shown} left"
