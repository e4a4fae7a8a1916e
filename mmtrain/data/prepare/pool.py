"""Worker processes and progress output of data preparation: a bar on a terminal, log lines elsewhere."""

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
    """Yield ``work(job)`` for each of ``jobs``, computed in worker processes.

    Args:
        workers: number of processes; None: one per core, at most 8. 0 or 1: run in this process.
        ordered: yield results in the order of the jobs; otherwise as they finish.

    Raises:
        UserError: if a process dies. Exceptions of ``work`` are raised unchanged. Jobs that have not begun are dropped
            in both cases.
    """
    if workers is not None and workers < 0:
        raise UserError(f"--workers {workers}: must be a number of processes, 0 or more")
    check_count("--workers", workers or 0, "processes")
    workers = min(min(8, os.cpu_count() or 1) if workers is None else workers, len(jobs))
    if workers <= 1:
        yield from map(work, jobs)
        return
    # Not fork: a forked process inherits locks that are held by threads of this process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent) as pool:
        try:
            futures = [pool.submit(work, job) for job in jobs]
            for done in futures if ordered else as_completed(futures):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, most often for lack of memory; use fewer --workers. A Python script must call "
                "this function inside `if __name__ == '__main__':`, or with workers=1"
            ) from error
        except Exception:
            # Running jobs still write files, which would conflict with a new start of the same command.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _die_with_parent() -> None:
    """Make this worker exit when its parent dies, and ignore interrupts, which the parent handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_PAUSE = 60.0  # longest time between two log lines, in seconds


class Advance(Protocol):
    """The function that reports progress."""

    def __call__(self, count: int, *, fresh: bool = True) -> None:
        """Report ``count`` more finished items. With ``fresh`` False the rate ignores them: they were done before."""
        ...


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show progress, rate and remaining time of ``total`` items; yields the function that reports finished items."""
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
    """Counts finished items and measures their rate."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.done = self.fresh = 0
        self.began = self.logged = time.monotonic()

    def count(self, count: int, fresh: bool) -> None:
        self.done += count
        if fresh:
            self.fresh += count
        elif not self.fresh:
            self.began = time.monotonic()

    @property
    def rate(self) -> float:
        """Fresh items per second; 0 before the first."""
        return self.fresh / max(time.monotonic() - self.began, 1e-6)

    def log(self, count: int, *, fresh: bool = True) -> None:
        """Count items, and log a line after each tenth of the total or each minute."""
        before, now = self.done, time.monotonic()
        self.count(count, fresh)
        if (self.total and before * 10 // self.total != self.done * 10 // self.total) or now - self.logged > _PAUSE:
            self.logged = now
            logger.info("%s", self)

    def __str__(self) -> str:
        text = f"{self.title}: {self.done} of {self.total}"
        if not self.fresh or self.done >= self.total:
            return text
        left = int((self.total - self.done) / self.rate)
        shown = f"{left // 3600} h {left % 3600 // 60} min" if left >= 3600 else f"{left // 60} min {left % 60} s"
        return f"{text}, {self.rate:.0f}/s, {shown} left"
