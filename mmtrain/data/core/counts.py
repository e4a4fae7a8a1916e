"""How many threads and processes may be started: a number that no machine can run ends in a crash of its libraries."""

from __future__ import annotations

import os

from mmtrain.errors import UserError

#: The most threads or processes for each processor, and the most on a machine with few of them.
_EACH, _LEAST = 16, 256
#: What ``data.workers`` counts.
WORKERS = "loader processes or threads of a rank"


def processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def check_count(key: str, count: int, what: str) -> None:
    """Raise UserError for more threads or processes (``what``) than this machine could run; ``key`` sets ``count``."""
    most = max(_LEAST, _EACH * (os.cpu_count() or 1))
    if count > most:
        equals = " " if key.startswith("--") else "="
        raise UserError(
            f"{key}{equals}{count}: no more than {most} {what} are started here, and as many as there are processors "
            f"({processors()}) is usually best"
        )


def set_threads(threads: int | None) -> None:
    """Set the number of threads that torch computes with (None: keep its default).

    Raises:
        UserError: for a number that this machine could not run.
    """
    if threads is None:
        return
    import torch  # light commands read this module

    check_count("threads", threads, "threads")
    torch.set_num_threads(threads)
