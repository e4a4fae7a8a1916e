"""A job as a user starts it, seen from outside: its launcher, its ranks, and what they wrote.

The launcher is forked from a server that has imported torch and mmtrain, and forks its ranks in turn where it would
start Python anew: an import of torch takes seconds a process. ``test_kill.py`` and the tests of Slurm start real ones.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ranks_apart import Fault, forkserver, write_output_to

ROOT = Path(__file__).resolve().parents[2]


class Launched:
    """``mmtrain submit --local WORLD`` in progress; its output goes to :attr:`said`."""

    def __init__(self, config: Path, folder: Path, world: int, *words: str, fault: Fault | None = None) -> None:
        self.folder, self.log = folder, folder.with_name(f"{folder.name}_said.txt")
        self.began = time.time()
        command = ["submit", "--config", str(config), "--run-dir", str(folder), "--local", str(world), *words]
        self.process = forkserver().Process(target=_launch, args=(command, self.log, fault))
        self.process.start()

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ranks(self) -> list[int]:
        """The processes of the ranks, in their order."""
        assert self.process.pid is not None
        return children(self.process.pid)

    def processes(self) -> list[int]:
        """The launcher's descendants: ranks, and the loader workers of each."""
        found, seen = self.ranks(), []
        while found:
            seen.append(found.pop(0))
            found += children(seen[-1])
        return seen

    def saving(self) -> bool:
        """Whether a checkpoint is being written: a folder that this launch has made, still under its other name."""
        found = [p for p in self.folder.glob("checkpoints/step_*.partial") if not p.name.endswith(".old.partial")]
        try:
            return any(p.stat().st_mtime > self.began for p in found)
        except FileNotFoundError:
            return False

    def end(self, seconds: float = 60.0) -> int:
        """Wait for the launcher; its exit status."""
        self.process.join(seconds)
        status = self.process.exitcode
        assert status is not None, f"the launcher still runs after {seconds} s: {self.said}"
        return status


class _ForkedRank:
    """Takes the place of ``subprocess.Popen`` in the launcher: a fork that runs ``python -m mmtrain …``."""

    fault: Fault | None = None

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "mmtrain"]
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for number in (signal.SIGTERM, signal.SIGUSR2):  # what a new program starts with
                signal.signal(number, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            os._exit(_run(command[3:], self.fault))

    def poll(self) -> int | None:
        return self._collect(os.WNOHANG)

    def wait(self) -> int | None:
        return self._collect(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _collect(self, options: int) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode


def _launch(command: list[str], log: Path, fault: Fault | None) -> None:
    from mmtrain.cluster import local

    write_output_to(log)
    _ForkedRank.fault = staticmethod(fault) if fault is not None else None  # type: ignore[assignment]
    local.subprocess = SimpleNamespace(Popen=_ForkedRank)  # type: ignore[assignment]
    os._exit(_run(command, None))


def _run(words: Sequence[str], fault: Fault | None) -> int:
    """What ``python -m mmtrain WORDS`` does, up to the end of the process; its exit status."""
    import torch

    from mmtrain.cli import main

    status: Any = 0
    sys.argv = ["mmtrain", *words]
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # the default, not the server's
    torch.set_num_threads(1)
    try:
        if fault is not None:
            fault(int(os.environ["RANK"]))
        main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


def started(config: Path, folder: Path, world: int = 1) -> subprocess.Popen[str]:
    """A real ``launch/submit.py --local WORLD``, as a process of its own; its messages come through ``stderr``."""
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--config", str(config), "--run-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--local", str(world)], env=environment, stderr=subprocess.PIPE, text=True)


def children(process: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to ask does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def notes(folder: Path, rank: int) -> dict[int, list[list[int]]]:
    """The samples that ``rank`` noted (``tracking.samples``), by step: once for each time that the step was taken."""
    found: dict[int, list[list[int]]] = {}
    file = folder / "samples" / f"rank_{rank:05d}.jsonl"
    for text in file.read_text().splitlines() if file.exists() else []:
        line = json.loads(text)
        found.setdefault(line["step"], []).append(line["samples"])
    return found


def steps_noted(folder: Path) -> int:
    """The newest step in the metrics of a run, 0 before its first line."""
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max((line["step"] for line in lines), default=0)
