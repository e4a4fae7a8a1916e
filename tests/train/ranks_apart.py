"""A run of several ranks with a fault built in, each rank a process of its own.

The processes are forked from a server that has imported torch and mmtrain, which saves seconds a run. What needs the
launcher itself is tested through the launcher (``launched.py``).
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

#: How long the other ranks may take to end after the first has failed: what the launcher gives them.
GRACE = 10.0

#: Called on each rank with its number before the run starts. It must be importable: a function or object of faults.py.
Fault = Callable[[int], None]


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit status (-9 after a kill, None where it had to be killed by us) and what it said."""

    status: int | None
    said: str


def forkserver() -> ForkServerContext:
    """Makes processes by forking a server that has imported torch, mmtrain and the faults."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.parallel.preload", "faults"])  # what there is of them
    return server


def write_output_to(log: Path) -> None:
    """Send the standard streams of this process to ``log``."""
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)


def run_ranks(
    config: Path, folder: Path, *overrides: str, world: int = 2, fault: Fault | None = None, limit: float = 180.0
) -> list[Ended]:
    """Train ``config`` in ``folder`` on ``world`` ranks, as ``mmtrain train`` does; how each of them ended."""
    server = forkserver()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [config.with_name(f"{folder.name}_rank_{rank}.txt") for rank in range(world)]  # folder may be on a full disk
    ranks = [
        server.Process(target=_rank, args=(rank, world, port, logs[rank], str(config), folder, overrides, fault))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + limit
    failed = False
    while any(process.exitcode is None for process in ranks) and time.monotonic() < end:
        if not failed and any(process.exitcode for process in ranks):
            failed, end = True, min(end, time.monotonic() + GRACE)
        time.sleep(0.02)
    statuses = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return [Ended(status, log.read_text()) for status, log in zip(statuses, logs, strict=True)]


def _rank(
    rank: int,
    world: int,
    port: int,
    log: Path,
    config: str,
    folder: Path,
    overrides: tuple[str, ...],
    fault: Fault | None,
) -> None:
    write_output_to(log)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    import torch

    from mmtrain.cli import run_app
    from mmtrain.cluster.task import run_training
    from mmtrain.config import load_config
    from mmtrain.tasks.forecasting import Forecasting

    Forecasting.illustrate = lambda task, model, folder: []  # type: ignore[method-assign]  # a picture takes a second
    torch.set_num_threads(1)
    if fault is not None:
        fault(rank)
    run_app(lambda: run_training(load_config(config, ("tracking.plots=false", *overrides)), folder))
