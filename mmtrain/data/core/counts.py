"""Limits on the number of threads and processes. A number far too large crashes the libraries that start them."""

from __future__ import annotations

import os

from mmtrain.errors import UserError

#: Maximum number of threads or processes per processor, and the maximum allowed on any machine, however small.
_EACH, _LEAST = 16, 256
#: Description of ``data.workers`` in messages.
WORKERS = "loader processes or threads of a rank"


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def check_count(key: str, count: int, what: str) -> None:
    """Raise UserError if ``count`` is more threads or processes than this machine can run.

    Args:
        key: configuration key or flag that sets ``count``.
        what: description of the threads or processes, for the message.
    """
    most = max(_LEAST, _EACH * (os.cpu_count() or 1))
    if count > most:
        equals = " " if key.startswith("--") else "="
        raise UserError(
            f"{key}{equals}{count}: the limit on this machine is {most} {what}. The number of processors "
            f"({processors()}) is usually the best value"
        )


def set_threads(threads: int | None) -> None:
    """Set the number of threads that torch computes with (None: keep torch's default).

    Raises:
        UserError: if this machine cannot run that many threads.
    """
    if threads is None:
        return
    import torch  # imported here, because light commands import this module

    check_count("threads", threads, "threads")
    torch.set_num_threads(threads)
