"""A job of several ranks as a user starts it, seen from outside: its processes, and what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Launched:
    """``launch/submit.py --local`` under way; what it says goes to ``said``."""

    def __init__(self, config: Path, folder: Path, world: int, *overrides: str, path: str = str(ROOT)) -> None:
        """
        Args:
            path: PYTHONPATH.
        """
        self.folder, self.log = folder, folder.with_name(f"{folder.name}_said.txt")
        self.began = time.time()
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--config", str(config)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--run-dir", str(folder), "--local", str(world), *overrides],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        """The processes of the ranks, in their order."""
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
        return self.process.wait(timeout=seconds)


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
