"""A Slurm cluster for tests, and a run on it, seen from outside as its user sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: A model that takes a few milliseconds a step, on images made up; batches that 1, 2, 3, 4 and 8 ranks can share.
TINY = """
name: tiny
model: {name: vim2_nano, num_classes: 10, dims: [8, 16], token_mixers: [2, 2], channel_expand: [1, 1], patch_size: 4}
task: {kind: classification, mixup: 0, cutmix: 0}
data: {kind: synthetic, image_size: 16, length: 480, val_length: 32, workers: 0}
optim: {lr: 1.0e-3}
train: {epochs: 1000, max_steps: 20, batch_size: 48, log_every: 1, precision: fp32}
eval: {every_steps: 1000, batch_size: 8, select: last}
checkpoint: {every_steps: 25, keep: 2}
tracking: {plots: false, samples: true}
threads: 1
device: cpu
cluster: {gpus_per_node: 0, cpus_per_task: 1, time: "30:00", margin: 60}
"""


class Cluster:
    """Four nodes on this machine, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }
        self.configuration = folder / "tiny.yaml"

    def up(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.configuration.write_text(TINY)
        self.ask(str(ROOT / "slurm/cluster.sh"), "up", str(self.folder), "4")

    def down(self) -> None:
        subprocess.run([ROOT / "slurm/cluster.sh", "down", self.folder], env=self.environment, check=False)

    def ask(self, *command: str, **more: Any) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, **more)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def resume(self, node: str) -> None:
        """Bring a node back that was set down. Its own daemon may have done so before, and Slurm refuses it then."""
        command = ["scontrol", "update", f"nodename={node}", "state=resume"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        state = self.ask("sinfo", "-h", "-N", "-n", node, "-p", "low", "-o", "%T").strip()
        assert done.returncode == 0 or not state.startswith(("down", "drain")), f"{node} is {state}: {done.stderr}"

    def free(self) -> None:
        """End what runs and wait for all nodes; one that does not come back (a step of Slurm's own that hangs) is
        started anew, with a warning: it must not fail the tests that follow."""
        self.ask("scancel", "--user", "root")
        end = time.monotonic() + 45
        while not self._is_free():
            if time.monotonic() > end:
                warnings.warn(self.ask(str(ROOT / "slurm/cluster.sh"), "heal", str(self.folder)), stacklevel=2)
                return
            time.sleep(0.2)

    def _is_free(self) -> bool:
        states = self.ask("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split()
        return not self.ask("squeue", "-h").strip() and set(states) == {"idle"}

    def try_to_submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch/submit.py"), *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)

    def submit(self, path: Path, *words: str, environment: dict[str, str] | None = None) -> Run:
        """Submit a run of the tiny configuration into ``path``, or go on with the one there."""
        where = ["--resume", str(path)] if (path / "config.yaml").exists() else [
            "--config", str(self.configuration), "--run-dir", str(path)
        ]  # fmt: skip
        command = [sys.executable, str(ROOT / "launch/submit.py"), *where, *words]
        done = subprocess.run(
            command, env=self.environment | (environment or {}), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return Run(self, path)

    def send_user_signal(self, on: bool) -> None:
        """Whether a preemption sends a job's own signal in place of SIGTERM, as sites differ in."""
        file = self.folder / "slurm.conf"
        lines = [line for line in file.read_text().splitlines() if not line.startswith("SlurmctldParameters")]
        lines[1:1] = ["SlurmctldParameters=preempt_send_user_signal"] if on else []
        file.write_text("\n".join(lines) + "\n")
        self.ask("scontrol", "reconfigure")

    def preempt(self) -> None:
        """A job of a higher priority that takes all nodes for two seconds."""
        self.ask("sbatch", "-p", "high", "-N4", "-c8", "--ntasks-per-node=1", "-o", "/dev/null", "--wrap", "sleep 2")


@dataclass
class Run:
    cluster: Cluster
    path: Path

    def journal(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in _lines(self.path / "jobs.jsonl") if line["kind"] == kind]

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in _lines(self.path / "metrics.jsonl") if line["kind"] == kind]

    @property
    def job(self) -> str:
        return str([*self.journal("submitted"), *self.journal("started")][-1]["job"])

    @property
    def state(self) -> str:
        return self.cluster.ask("squeue", "-h", "-t", "all", "-j", self.job, "-o", "%T").strip()

    def newest_save(self) -> float:
        """When the newest checkpoint was complete, in Unix seconds; 0 without one."""
        times = [path.stat().st_mtime for path in self.path.glob("checkpoints/step_*/manifest.json")]
        return max(times, default=0.0)

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").exists()

    def wait(self, until: Callable[[], bool], seconds: float = 180, what: str = "") -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, f"not within {seconds} s: {what}\n{self.told()}"
            time.sleep(0.1)

    def wait_for_start(self, number: int) -> None:
        """Until the run trains for the ``number``-th time."""

        def trains() -> bool:
            started = self.journal("started")
            if len(started) < number:
                return False
            return any(line["time"] > started[-1]["time"] for line in self.metrics("train"))

        self.wait(trains, what=f"start {number}")

    def wait_for_end(self, seconds: float = 300) -> None:
        """Until the run is finished and its job gone."""
        self.wait(lambda: self.finished and self.state == "COMPLETED", seconds, "the end of the run")

    def reasons(self) -> list[str]:
        return [line["reason"] for line in self.journal("ended")]

    def restarts(self) -> int:
        """How often Slurm has put the job back into the queue."""
        shown = self.cluster.ask("scontrol", "show", "job", self.job)
        return int(shown.split("Restarts=")[1].split()[0])

    def tasks(self) -> list[int]:
        """The processes of the job's tasks, of all nodes."""
        found = self.cluster.ask("pgrep", "-f", f"submitit.core._submit {self.path}/slurm")
        return [int(pid) for pid in found.split()]

    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.metrics("train")}

    def consumed(self) -> dict[int, list[int]]:
        """The samples of each step. Of a step that was taken again the last time counts."""
        steps: dict[int, dict[int, list[int]]] = {}
        for path in sorted(self.path.glob("samples/rank_*.jsonl")):
            for line in _lines(path):
                steps.setdefault(line["step"], {})[int(path.stem[-5:])] = line["samples"]
        return {step: sorted(chain.from_iterable(ranks.values())) for step, ranks in sorted(steps.items())}

    def told(self) -> str:
        """What helps to see why a test failed."""
        logs = sorted((self.path / "slurm").glob("*_log.*"), key=lambda path: path.stat().st_mtime)
        tails = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in logs[-6:])
        return f"{(self.path / 'jobs.jsonl').read_text()}\n{self.cluster.ask('squeue', '-t', 'all')}\n{tails}"


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
