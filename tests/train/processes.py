"""Run a function of a test module in several processes that form a gloo group."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mmtrain.parallel.ranks import Ranks, init_distributed

Work = Callable[[Ranks], Any]


def in_processes(work: Work, world: int, folder: Path) -> list[Any]:
    """What ``work(ranks)`` gives in each of ``world`` processes, by rank. ``work``: a function at a module's top."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one, (work, world, port, folder), nprocs=world)
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world)]


def _one(rank: int, work: Work, world: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with init_distributed("cpu") as ranks:
        torch.save(work(ranks), folder / f"result_{rank}.pt")
