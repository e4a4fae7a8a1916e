"""Processes that work for a preparation, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from mmtrain.errors import UserError

Job = TypeVar("Job")
Done = TypeVar("Done")


def run_jobs(work: Callable[[Job], Done], jobs: Sequence[Job], workers: int, *, ordered: bool) -> Iterator[Done]:
    """``work`` of each job in ``workers`` processes (up to 1: in this one): in order, or as they are finished.

    Raises what ``work`` raises, and UserError if a process dies; jobs that have not begun are dropped then.
    """
    workers = min(workers, len(jobs))
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
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _die_with_parent() -> None:
    """Workers of a killed process would wait for work for ever. An interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
