"""A gang: a number of processes that stay, and run one job after another together.

Importing torch and DeepSpeed takes seconds and the jobs are many. So the processes are forked from a server that has
imported both (and nothing else: it has no thread and no process group), and each job makes its own process group.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: How long the other ranks may take to end a job in which one has failed, in seconds.
_GRACE = 5.0


class GangError(AssertionError):
    """A job failed on some rank, or did not end in time."""


class Gang:
    """``world`` processes. What a job prints goes to a file a rank in ``folder``."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder = world, folder
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, job: Callable[..., Any], *arguments: Any, limit: float = 300.0) -> list[Any]:
        """What ``job(*arguments)`` gives on each rank, with torchrun's variables set.

        Args:
            job: a function at a module's top.
            limit: seconds after which the gang is killed (the next job gets a new one).

        Raises:
            GangError: with the traceback of the first rank that failed, or the ranks that hang.
        """
        if not self._processes:
            self._start()
        port = _free_port()
        for pipe in self._pipes:
            pipe.send((job, arguments, port))
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + limit
        while len(answers) < self.world and (left := end - time.monotonic()) > 0:
            for pipe in wait([p for r, p in enumerate(self._pipes) if r not in answers], left):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, f"the process of rank {rank} died")
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + _GRACE)
        failed = [f"rank {rank}: {value}" for rank, (good, value) in sorted(answers.items()) if not good]
        silent = [rank for rank in range(self.world) if rank not in answers]
        if failed or silent:
            self.stop()
            hung = [f"no answer from rank {', '.join(map(str, silent))} of {self.world}"] if silent else []
            raise GangError("\n".join([*failed, *hung, f"what the ranks said is in {self.folder}"]))
        return [answers[rank][1] for rank in range(self.world)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["tests.parallel.preload"])
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank in range(self.world):
            ours, theirs = server.Pipe()
            process = server.Process(target=_serve, args=(rank, self.world, theirs, self.folder), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, world: int, pipe: Connection, folder: Path) -> None:
    """Rank ``rank``: take jobs until the pipe is closed."""
    import torch

    log = os.open(folder / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), **local, "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    gc.freeze()  # a collection has no use for all that was imported
    while True:
        try:
            job, arguments, port = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        try:
            answer = (True, job(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
            print(answer[1])
        print(f"{job.__name__} of {arguments[1:]} ended, {time.process_time():.1f} s of CPU so far", flush=True)
        pipe.send(answer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
