"""``jobs.jsonl`` of a run folder: every job that was submitted, started or ended for the run, a line each.

Also what the tasks of a Slurm job leave in the folder, which decides whether the job is queued again.

Kinds of lines, all with ``time`` (Unix seconds):

- ``submitted``: ``job`` (Slurm's id), ``nodes`` (number or range, as text), ``tasks`` (a node).
- ``started``: written by rank 0. ``job`` (None without Slurm), ``restart`` (Slurm's count, from 0), ``hosts``,
  ``world``; without Slurm also ``pid`` (of rank 0) and ``host``.
- ``data_changed``: the run continued with other data, since ``data.accept_changes`` was set: ``step``, ``changes``.
- ``data_recorded``: a run of an earlier version has no fingerprint of its data, and got one: ``step``.
- ``ended``: ``job``, ``restart``, ``reason`` (one of :data:`REASONS`), ``requeued``, ``step`` (of the newest
  checkpoint).

A line of it, or of ``metrics.jsonl``, may be torn by a kill, or damaged by a disk or a hand. One such line must not
hide the others, let alone other runs: readers leave it out and count it.
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
    """One start of a Slurm job: its id, and how often it had been started before."""

    job: str
    restart: int

    @classmethod
    def current(cls) -> JobAttempt:
        return cls(os.environ.get("SLURM_JOB_ID", "0"), slurm.restart_count())

    def failure_folder(self, run: Path) -> Path:
        """The folder with a file for each rank that raised an error."""
        return run / "failures" / f"{self.job}_{self.restart}"

    def failure_reports(self, run: Path) -> list[dict[str, Any]]:
        """What the ranks that raised an error left, the causes before those that only lost their connection."""
        found = []
        for path in sorted(self.failure_folder(run).glob("rank_*.json")):
            try:
                found.append({**json.loads(path.read_text()), "at": path.stat().st_mtime})
            except ValueError:  # cut off by a kill
                continue
        return sorted(found, key=lambda report: (report["follows"], report["at"]))

    def _note(self, run: Path) -> Path:
        return run / f".left_{self.job}_{self.restart}"

    def note_clean_stop(self, run: Path, signal: str) -> None:
        """Say that all ranks have left in good order, with a checkpoint, because of ``signal``."""
        self._note(run).write_text(signal)

    def take_clean_stop(self, run: Path) -> str | None:
        """The signal of :meth:`note_clean_stop`, which is forgotten then; None where there was no such note."""
        try:
            signal = self._note(run).read_text()
        except FileNotFoundError:
            return None
        self._note(run).unlink(missing_ok=True)
        return signal


#: Why a job ended: the run was finished; a signal announced a preemption, a time limit; somebody asked it to stop; a
#: rank raised an error; a rank or a node was lost without a word; nodes could not work together.
REASONS = ("finished", "preempted", "timeout", "stopped", "failed", "lost", "bad_nodes")

NAME = "jobs.jsonl"


def record(run: Path, kind: str, **values: Any) -> None:
    """Append a line to the journal of the run folder ``run``."""
    append_json_line(run / NAME, {"kind": kind, **values, "time": time.time()})


def record_start(run: Path, world: int) -> None:
    """Note that this process, rank 0 of ``world``, begins to train."""
    if "SLURM_JOB_ID" not in os.environ:
        host = gethostname()
        record(run, "started", job=None, restart=0, hosts=[host], world=world, pid=os.getpid(), host=host)
    else:
        attempt = JobAttempt.current()
        try:
            hosts = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
        except (KeyError, UserError):  # in a container Slurm's programs may be missing: that must not stop a run
            hosts = [gethostname()]
        record(run, "started", job=attempt.job, restart=attempt.restart, hosts=hosts, world=world)


def began_here(run: Path) -> bool:
    """True where the journal's last word is that this process, outside of Slurm, began to train."""
    lines = [line for line in read(run) if line.get("kind") in ("submitted", "started", "ended")]
    begin = lines[-1] if lines else {}
    mine = begin.get("pid") == os.getpid() and begin.get("host") == gethostname()
    return mine and begin.get("kind") == "started" and begin.get("job") is None


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of the journal of ``run``, oldest first; none where there is no journal."""
    return read_lines(run / NAME).lines


def last_job(run: Path) -> str | None:
    """The id of the Slurm job that was last submitted for ``run``."""
    jobs = [line["job"] for line in read(run) if line["kind"] in ("submitted", "started") and line.get("job")]
    return jobs[-1] if jobs else None


Line = dict[str, Any]

#: Numbers in a line. A loss may have become infinite or NaN; the others are finite and not negative.
_MEASURED = frozenset({"loss", "lr", "grad_norm", "top1", "top5", "mse", "mae", "samples_per_second"})
_COUNTED = frozenset({"step", "from_step", "samples", "epoch", "time", "step_seconds"})
#: No step, number of samples or time is larger: they are exact in a float, and a date can be made of the time.
_MOST, _LAST_TIME = 2**53, 1e11


class Lines(NamedTuple):
    """``damaged``: how many lines were left out; ``first``: the number of the first of them, from 1."""

    lines: list[Line]
    damaged: int
    first: int | None

    def warning(self, file: Path) -> str | None:
        """A sentence about the lines that were left out; None where there are none."""
        if not self.damaged:
            return None
        return f"{file}: {self.damaged} damaged line(s) left out, the first of them line {self.first}"


def sound_line(text: str) -> Line | None:
    """The object in a line where its kind is text and its numbers are numbers; None for others."""
    line = parse_json_line(text)
    if line is None or not isinstance(line.get("kind"), str):
        return None
    return line if all(_sound(key, value) for key, value in line.items()) else None


def _sound(key: str, value: Any) -> bool:
    if key not in _COUNTED and key not in _MEASURED:
        return not isinstance(value, int) or abs(value) <= 2**63
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if key in _MEASURED:
        return isinstance(value, float) or abs(value) <= _MOST
    return 0 <= value <= (_LAST_TIME if key == "time" else _MOST)


def sound_lines(content: str) -> Lines:
    """The lines of ``content`` that can be used, oldest first. An empty one is no damage, nor one without an end."""
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
    """The lines of ``file`` that can be used; none where there is no such file."""
    try:
        return sound_lines(file.read_text(errors="replace"))
    except FileNotFoundError:
        return Lines([], 0, None)
