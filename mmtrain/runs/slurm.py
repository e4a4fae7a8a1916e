"""Queries and commands to Slurm, through its command-line programs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

from mmtrain.errors import UserError

#: States of a job that may still run, now or again.
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "STOPPED")


def has_slurm() -> bool:
    """Return whether Slurm is installed on this machine."""
    return shutil.which("sbatch") is not None


def states(jobs: Sequence[str]) -> dict[str, str]:
    """Return the state, such as RUNNING, of each of ``jobs`` that Slurm still knows. Empty without Slurm."""
    return query_states(jobs) or {} if jobs else {}


def query_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """Return the same as :func:`states`, or None if there is no Slurm or it does not respond."""
    if shutil.which("squeue") is None:
        return None
    known = {}
    # squeue refuses a list that contains an unknown id, so request all jobs.
    reply = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%A|%T"], capture_output=True, text=True, timeout=30)
    if reply.returncode:
        return None
    for line in reply.stdout.splitlines():
        job, _, state = line.partition("|")
        if job in jobs:
            known[job] = state
    return known


def is_live(job: str) -> bool:
    """Return whether ``job`` is waiting, running, or requeued."""
    return states([job]).get(job) in LIVE


def restart_count() -> int:
    """Return how often Slurm has restarted the job of this process. 0 outside a job."""
    found = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(found) if found.isdecimal() else 0


def seconds_left(job: str) -> float | None:
    """Return the seconds until the time limit of the running ``job``, or None if there is no limit or no response."""
    if shutil.which("squeue") is None:
        return None
    reply = subprocess.run(["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=30)
    return parse_duration(reply.stdout.strip())


def excluded(job: str) -> list[str]:
    """Return the nodes that ``job`` must not run on."""
    nodes = _shown(job, "ExcNodeList")
    return hostnames(nodes) if nodes not in ("", "(null)") else []


def restarts(job: str) -> int:
    """Return how often Slurm has requeued ``job``."""
    return int(_shown(job, "Restarts") or 0)


def _shown(job: str, key: str) -> str:
    """Return the value of ``key`` in the output of ``scontrol show job``, or "" if it is not there."""
    pairs = (word.partition("=") for word in scontrol("show", "job", job).split())
    return next((value for name, _, value in pairs if name == key), "")


def parse_duration(text: str) -> float | None:
    """Convert Slurm's ``[days-]hours:minutes:seconds``, ``minutes:seconds`` or ``minutes`` to seconds.

    Return None for any other text.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds


def hostnames(nodes: str) -> list[str]:
    """Expand Slurm's short form ``node[1-4]`` into the names of nodes.

    Raises:
        UserError: if the text contains a range and scontrol is not available.
    """
    if "[" not in nodes:
        return nodes.split(",")
    return scontrol("show", "hostnames", nodes).split()


def scontrol(*arguments: str) -> str:
    """Run ``scontrol`` and return its output.

    scontrol ignores the signals that announce the end of a job, since a requeue causes them and must not be interrupted
    by them.

    Raises:
        UserError: if scontrol fails, with its message, or if it is not installed.
    """
    quiet = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
    if shutil.which("scontrol") is None:
        raise UserError(
            "scontrol is not available on this machine or in this container. Run the command where Slurm is installed"
        )
    done = subprocess.run(
        ["scontrol", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in quiet],
    )
    if done.returncode:
        raise UserError(f"scontrol {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
