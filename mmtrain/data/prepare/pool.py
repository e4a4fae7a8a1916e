"""Processes that work for a preparation, and its progress: a bar on a terminal, lines elsewhere (log files)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import Protocol, TypeVar

from mmtrain.data.core.counts import check_count
from mmtrain.errors import UserError
from mmtrain.log import logger

Job = TypeVar("Job")
Done = TypeVar("Done")


def run_jobs(work: Callable[[Job], Done], jobs: Sequence[Job], workers: int | None, *, ordered: bool) -> Iterator[Done]:
    """``work`` of each job in ``workers`` processes: in order, or as they are finished.

    ``workers`` None: one per core, at most 8. Up to 1: in this process. Raises what ``work`` raises, and UserError if a
    process dies; jobs that have not begun are dropped then.
    """
    if workers is not None and workers < 0:
        raise UserError(f"--workers {workers}: processes, 0 or 1 for none but this one")
    check_count("--workers", workers or 0, "processes")
    workers = min(min(8, os.cpu_count() or 1) if workers is None else workers, len(jobs))
    if workers <= 1:
        yield from map(work, jobs)
        return
    # spawn: a fork would inherit the threads' locks of whatever this process has loaded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent) as pool:
        try:
            futures = [pool.submit(work, job) for job in jobs]
            for done in futures if ordered else as_completed(futures):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died: most often for lack of memory (use fewer --workers), or because a script calls "
                "this outside of `if __name__ == '__main__':` (or use workers=1)"
            ) from error
        except Exception:
            # the jobs that run still write files, beside which the same command may begin again
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _die_with_parent() -> None:
    """End this worker with its parent, which may be killed; an interrupt is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_PAUSE = 60.0  # seconds


class Advance(Protocol):
    def __call__(self, count: int, *, fresh: bool = True) -> None:
        """``count`` more are done; not ``fresh``: they were done before, and say nothing about the rate."""
        ...


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Yields ``advance(count)``; shows the rate and the time left."""
    meter = _Meter(title, total)
    if not sys.stderr.isatty():
        yield meter.log
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, rate="")

        def show(count: int, *, fresh: bool = True) -> None:
            meter.count(count, fresh)
            bar.update(task, advance=count, rate=f"{meter.rate:.0f}/s" if meter.rate else "")

        yield show


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

    def log(self, count: int, *, fresh: bool = True) -> None:
        """Count, and log a line for every tenth or minute."""
        before, now = self.done, time.monotonic()
        self.count(count, fresh)
        if (self.total and before * 10 // self.total != self.done * 10 // self.total) or now - self.said > _PAUSE:
            self.said = now
            logger.info("%s", self)

    def __str__(self) -> str:
        text = f"{self.title}: {self.done} of {self.total}"
        if not self.fresh or self.done >= self.total:
            return text
        left = int((self.total - self.done) / self.rate)
        shown = f"{left // 3600} h {left % 3600 // 60} min" if left >= 3600 else f"{left // 60} min {left % 60} s"
        return f"{text}, {self.rate:.0f}/s, {shown} left"
