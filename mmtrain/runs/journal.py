"""The journal of a run (``jobs.jsonl``): one line for each job that was submitted, started or ended.

This module also reads and writes the files that the tasks of a Slurm job leave in the run folder. They decide whether
the job is requeued.

Kinds of lines, all with ``time`` (Unix seconds):

- ``submitted``: ``job`` (Slurm's id), ``nodes`` (number or range, as text), ``tasks`` (per node).
- ``started``: written by rank 0. ``job`` (None without Slurm), ``restart`` (Slurm's count, from 0), ``hosts``,
  ``world``; without Slurm also ``pid`` (of rank 0) and ``host``.
- ``data_changed``: the run continued with changed data (``data.accept_changes``). ``step``, ``changes``.
- ``data_recorded``: a run of version 0.1.0 received a fingerprint of its data. ``step``.
- ``ended``: ``job``, ``restart``, ``reason`` (one of :data:`REASONS`), ``requeued``, ``step`` (of the newest
  checkpoint).

A line of the journal or of ``metrics.jsonl`` may be incomplete after a kill, or damaged. Readers skip and count such
lines, so that they do not hide other lines or other runs.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any, NamedTuple

from mmtrain.errors import UserError
from mmtrain.files import append_json_line, parse_json_line
from mmtrain.runs import slurm


@dataclass(frozen=True)
class JobAttempt:
    """One start of a Slurm job: its id, and the number of earlier starts."""

    job: str
    restart: int

    @classmethod
    def current(cls) -> JobAttempt:
        """Return the job attempt of this process (job "0" outside Slurm)."""
        return cls(os.environ.get("SLURM_JOB_ID", "0"), slurm.restart_count())

    def failure_folder(self, run: Path) -> Path:
        """Return the folder with one file for each rank that raised an error."""
        return run / "failures" / f"{self.job}_{self.restart}"

    def failure_reports(self, run: Path) -> list[dict[str, Any]]:
        """Read the reports of ranks that raised an error: causes first, then ranks that only lost their connection."""
        found = []
        for path in sorted(self.failure_folder(run).glob("rank_*.json")):
            try:
                found.append({**json.loads(path.read_text()), "at": path.stat().st_mtime})
            except ValueError:  # incomplete after a kill
                continue
        return sorted(found, key=lambda report: (report["follows"], report["at"]))

    def _note(self, run: Path) -> Path:
        return run / f".left_{self.job}_{self.restart}"

    def note_clean_stop(self, run: Path, signal: str) -> None:
        """Record that all ranks saved a checkpoint and stopped because of ``signal``."""
        self._note(run).write_text(signal)

    def take_clean_stop(self, run: Path) -> str | None:
        """Return and delete the signal that :meth:`note_clean_stop` recorded, or return None."""
        try:
            signal = self._note(run).read_text()
        except FileNotFoundError:
            return None
        self._note(run).unlink(missing_ok=True)
        return signal


#: Why a job ended: run finished; preempted; time limit; stopped by a user; error of a rank; a rank or node was lost
#: without an error; nodes failed the checks before the start.
REASONS = ("finished", "preempted", "timeout", "stopped", "failed", "lost", "bad_nodes")

NAME = "jobs.jsonl"


def record(run: Path, kind: str, **values: Any) -> None:
    """Append a line of the given kind to the journal of the run folder ``run``."""
    append_json_line(run / NAME, {"kind": kind, **values, "time": time.time()})


def record_start(run: Path, world: int) -> None:
    """Record that this process, rank 0 of ``world`` ranks, starts to train."""
    if "SLURM_JOB_ID" not in os.environ:
        host = gethostname()
        record(run, "started", job=None, restart=0, hosts=[host], world=world, pid=os.getpid(), host=host)
    else:
        attempt = JobAttempt.current()
        try:
            hosts = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
        except (KeyError, UserError):  # Slurm's programs may be missing in a container
            hosts = [gethostname()]
        record(run, "started", job=attempt.job, restart=attempt.restart, hosts=hosts, world=world)


def began_here(run: Path) -> bool:
    """Return whether the last line of the journal is the start of this process, outside Slurm."""
    lines = [line for line in read(run) if line.get("kind") in ("submitted", "started", "ended")]
    begin = lines[-1] if lines else {}
    this_process = begin.get("pid") == os.getpid() and begin.get("host") == gethostname()
    return this_process and begin.get("kind") == "started" and begin.get("job") is None


def read(run: Path) -> list[dict[str, Any]]:
    """Read the journal of ``run``, oldest line first. Return an empty list if there is none."""
    return read_lines(run / NAME).lines


def last_job(run: Path) -> str | None:
    """Return the id of the newest Slurm job of ``run``, or None."""
    jobs = [line["job"] for line in read(run) if line["kind"] in ("submitted", "started") and line.get("job")]
    return jobs[-1] if jobs else None


Line = dict[str, Any]

#: Keys with numbers: measured ones may be infinite or NaN; the others must be finite and not negative.
_MEASURED = frozenset({"loss", "lr", "grad_norm", "top1", "top5", "mse", "mae", "samples_per_second"})
_COUNTED = frozenset({"step", "from_step", "samples", "epoch", "time", "step_seconds"})
#: Upper limits: integers up to 2**53 are exact in a float; times can be converted to a date.
_MOST, _LAST_TIME = 2**53, 1e11


class Lines(NamedTuple):
    """Valid lines of a file, the number of damaged lines, and the number of the first damaged line, from 1."""

    lines: list[Line]
    damaged: int
    first: int | None

    def warning(self, file: Path) -> str | None:
        """Return a warning about damaged lines of ``file``, or None if there are none."""
        if not self.damaged:
            return None
        return f"{file}: {self.damaged} damaged line(s) skipped, the first is line {self.first}"


def sound_line(text: str) -> Line | None:
    """Parse a line. Return None unless it is an object with a textual ``kind`` and valid numbers."""
    line = parse_json_line(text)
    if line is None or not isinstance(line.get("kind"), str):
        return None
    return line if all(_sound(key, value) for key, value in line.items()) else None


def _sound(key: str, value: Any) -> bool:
    """Return whether ``value`` is valid for ``key``."""
    if key not in _COUNTED and key not in _MEASURED:
        return not isinstance(value, int) or abs(value) <= 2**63
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if key in _MEASURED:
        return isinstance(value, float) or abs(value) <= _MOST
    return 0 <= value <= (_LAST_TIME if key == "time" else _MOST)


def sound_lines(content: str) -> Lines:
    """Parse the valid lines of ``content``. Empty lines and an incomplete last line do not count as damaged."""
    found: list[Line] = []
    damaged, first = 0, None
    texts = content.splitlines()
    ended = len(texts) if content.endswith("\n") else len(texts) - 1
    for number, text in enumerate(texts, 1):
        line = sound_line(text)
        if line is not None:
            found.append(line)
        elif text.strip() and number <= ended:
            damaged, first = damaged + 1, first or number
    return Lines(found, damaged, first)


def read_lines(file: Path) -> Lines:
    """Parse the valid lines of ``file``. Return no lines if the file does not exist."""
    try:
        return sound_lines(file.read_text(errors="replace"))
    except FileNotFoundError:
        return Lines([], 0, None)
