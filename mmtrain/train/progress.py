"""Live progress: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger("mmtrain")

#: Away from a terminal, say how far we are at most this often, in seconds.
_PLAIN_EVERY = 5.0


class Progress:
    """Steps done of ``total``, with rate, ETA, loss and learning rate."""

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.begin, self.begin_step = time.monotonic(), done
        self._said_at = 0.0
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=total, completed=done, detail="")
            self._bar.start()

    def advance(
        self, step: int, loss: float | None = None, lr: float | None = None, speed: float | None = None
    ) -> None:
        detail = f"loss {loss:.4f}  lr {lr:.2e}  {speed:.0f} samples/s" if loss is not None else ""
        if self._bar:
            self._bar.update(self._task, completed=step)
            if detail:
                self._bar.update(self._task, detail=detail)
        elif detail and (time.monotonic() - self._said_at > _PLAIN_EVERY or step == self.total):
            self._said_at = time.monotonic()
            logger.info("step %d/%d  %s  eta %s", step, self.total, detail, self._eta(step))

    def _eta(self, step: int) -> str:
        seconds = (time.monotonic() - self.begin) * (self.total - step) / max(step - self.begin_step, 1)
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}:{rest:02d}"

    def say(self, message: str) -> None:
        if self._bar:
            self._bar.console.print(message, highlight=False, markup=False)
        logger.log(logging.DEBUG if self._bar else logging.INFO, message)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
