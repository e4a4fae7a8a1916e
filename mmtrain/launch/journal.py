"""``jobs.jsonl`` of a run folder: every job that was submitted, started or ended for the run, a line each.

Kinds of lines, all with ``time`` (Unix seconds):

- ``submitted``: ``job`` (Slurm's id), ``nodes`` (number or range, as text), ``tasks`` (a node).
- ``started``: written by rank 0. ``job`` (None without Slurm), ``restart`` (Slurm's count, from 0), ``hosts``,
  ``world``; without Slurm also ``pid`` (of rank 0) and ``host``.
- ``ended``: ``job``, ``restart``, ``reason`` (one of :data:`REASONS`), ``requeued``, ``step`` (of the newest
  checkpoint).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from socket import gethostname
from typing import Any

from mmtrain.launch import slurm
from mmtrain.launch.outcome import Place
from mmtrain.lines import read_lines

#: Why a job ended: the run was finished; a signal announced a preemption, a time limit; somebody asked it to stop; a
#: rank raised an error; a rank or a node was lost without a word; nodes could not work together.
REASONS = ("finished", "preempted", "timeout", "stopped", "failed", "lost", "bad_nodes")

NAME = "jobs.jsonl"


def note(run: Path, kind: str, **values: Any) -> None:
    """Append a line to the journal of the run folder ``run``."""
    line = json.dumps({"kind": kind, **values, "time": time.time()}) + "\n"
    # one write of one line in append mode: lines of several processes do not mix
    descriptor = os.open(run / NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def note_start(run: Path, world: int) -> None:
    """Note that this process, rank 0 of ``world``, begins to train."""
    if "SLURM_JOB_ID" not in os.environ:
        host = gethostname()
        note(run, "started", job=None, restart=0, hosts=[host], world=world, pid=os.getpid(), host=host)
    else:
        place, hosts = Place.here(), slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
        note(run, "started", job=place.job, restart=place.restart, hosts=hosts, world=world)


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of the journal of ``run``, oldest first; none where there is no journal."""
    return read_lines(run / NAME)


def last_job(run: Path) -> str | None:
    """The id of the Slurm job that was last submitted for ``run``."""
    jobs = [line["job"] for line in read(run) if line["kind"] in ("submitted", "started") and line.get("job")]
    return jobs[-1] if jobs else None
