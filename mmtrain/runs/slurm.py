"""The few questions and orders that go to Slurm's own programs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

from mmtrain.errors import UserError

#: States of a job that may still run, or run again.
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "STOPPED")


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def states(jobs: Sequence[str]) -> dict[str, str]:
    """The state of each of ``jobs`` that Slurm still knows, such as RUNNING, in one question. Empty without Slurm."""
    return query_states(jobs) or {} if jobs else {}


def query_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """As :func:`states`, but None where there is no Slurm, or it gives no answer: then nothing is known of any job."""
    if shutil.which("squeue") is None:
        return None
    known = {}
    # an unknown id makes squeue refuse the whole list, so that it is asked for all jobs of everyone's that it knows
    asked = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%A|%T"], capture_output=True, text=True, timeout=30)
    if asked.returncode:
        return None
    for line in asked.stdout.splitlines():
        job, _, state = line.partition("|")
        if job in jobs:
            known[job] = state
    return known


def is_live(job: str) -> bool:
    """True where ``job`` waits, runs, or is about to run again."""
    return states([job]).get(job) in LIVE


def restart_count() -> int:
    """How often Slurm had started this job before; 0 outside a job."""
    found = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(found) if found.isdecimal() else 0


def seconds_left(job: str) -> float | None:
    """Seconds until the time limit of the running ``job``; None where there is no limit or Slurm does not tell."""
    if shutil.which("squeue") is None:
        return None
    asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=30)
    return parse_duration(asked.stdout.strip())


def excluded(job: str) -> list[str]:
    """The nodes that ``job`` must not run on."""
    nodes = _shown(job, "ExcNodeList")
    return hostnames(nodes) if nodes not in ("", "(null)") else []


def restarts(job: str) -> int:
    """How often Slurm has put ``job`` back into the queue."""
    return int(_shown(job, "Restarts") or 0)


def _shown(job: str, key: str) -> str:
    """The value of ``key`` in what scontrol shows of ``job``; empty where it is not shown."""
    pairs = (word.partition("=") for word in scontrol("show", "job", job).split())
    return next((value for name, _, value in pairs if name == key), "")


def parse_duration(text: str) -> float | None:
    """Seconds of Slurm's ``[days-]hours:minutes:seconds``, ``minutes:seconds`` or ``minutes``; None for others."""
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
    """The names in Slurm's short form ``node[1-4]``.

    Raises:
        UserError: where there is a range, and no scontrol to expand it.
    """
    if "[" not in nodes:
        return nodes.split(",")
    return scontrol("show", "hostnames", nodes).split()


def scontrol(*words: str) -> str:
    """Run ``scontrol`` with ``words``; returns what it says.

    The signals that announce the end of the job are kept from it: a requeue sends them, and must not die of them.

    Raises:
        UserError: with Slurm's own words, where it refuses, or where there is no scontrol.
    """
    quiet = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
    if shutil.which("scontrol") is None:
        raise UserError("there is no scontrol on this machine (or in this container): Slurm cannot be asked")
    done = subprocess.run(
        ["scontrol", *words],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in quiet],
    )
    if done.returncode:
        raise UserError(f"scontrol {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
