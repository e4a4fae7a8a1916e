"""Determine the status of runs from their folders, the processes of this machine, and one query to Slurm."""

from __future__ import annotations

import math
import socket
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mmtrain.runs import slurm
from mmtrain.runs.reader import Line, RunRecord, read_run


def runs_training(pid: int) -> bool:
    """Return whether the process ``pid`` exists and its command line names mmtrain or its launcher.

    The command line is checked because another process may have the same pid after a reboot.
    """
    try:
        command = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return any("mmtrain" in word or "submit.py" in word for word in command)


#: By kind of task: the metric that selects the best checkpoint, and the function that returns the better value.
METRICS = {"classification": ("top1", max), "forecasting": ("mse", min)}

#: Slurm's states of a job that waits for its first or next start.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")
_FAILED = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "LAUNCH_FAILED")

#: A live run is stalled if it has written nothing for this many seconds and for the duration of this many steps.
_QUIET, _QUIET_STEPS = 60.0, 10
#: Seconds until the first line of a job, which includes compiling: the default of parallel.start_timeout.
_START_TIMEOUT = 1800.0


@dataclass(frozen=True)
class Environment:
    """Information that is not in the run folders.

    Attributes:
        now: the current time in Unix seconds.
        host: this host.
        slurm: Slurm's state of each job, or None if Slurm is not available here.
        pids: pids, among those in the journals, of processes of this host that run mmtrain.
    """

    now: float
    host: str
    slurm: Mapping[str, str] | None = None
    pids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Status:
    """Row of the table of runs. Unknown values are None.

    Attributes:
        state: result of :func:`state_of`.
        step: last step; ``total`` is the number of steps of the run.
        speed: samples per second.
        eta: seconds to the last step.
        metric: name of the metric of ``best`` (validation) and ``test``.
        written: time of the last write, in Unix seconds.
        damaged: number of the first damaged line of metrics.
    """

    path: Path
    model: str
    state: str
    step: int
    total: int | None
    loss: float | None
    speed: float | None
    eta: float | None
    nodes: str | None
    restarts: int
    metric: str
    best: float | None
    test: float | None
    written: float
    damaged: int | None = None


def run_statuses(paths: Sequence[Path]) -> list[Status]:
    """Return the status of each run, with one query to Slurm for all of them."""
    records = [read_run(path) for path in paths]
    environment = observe(records)
    return [status(record, environment) for record in records]


def observe(records: Sequence[RunRecord]) -> Environment:
    """Query Slurm and the operating system for the jobs and processes in the journals of ``records``."""
    host, starts = socket.gethostname(), [last_launch(record) for record in records]
    jobs = sorted({str(line["job"]) for line in starts if line and line.get("job")})
    own = [line["pid"] for line in starts if line and line.get("host") == host and isinstance(line.get("pid"), int)]
    pids = {pid for pid in own if 0 < pid < 2**31}
    try:
        states = slurm.query_states(jobs) if jobs else None
    except (OSError, subprocess.SubprocessError):  # runs are not lost just because Slurm does not respond
        states = None
    return Environment(time.time(), host, states, frozenset(pid for pid in pids if runs_training(pid)))


def status(record: RunRecord, environment: Environment) -> Status:
    """Compute the row of one run in the table."""
    name, better = METRICS.get(str(record.setting("task.kind")), ("loss", min))
    train = record.of_kind("train")
    values = [
        value
        for line in record.of_kind("eval")
        if line.get("split") == "val" and (value := number(line, name)) is not None
    ]
    state, total, step = state_of(record, environment), total_steps(record), last_step(record)
    return Status(
        path=record.path,
        model=str(record.setting("model.name") or "?"),
        state=state,
        step=step,
        total=total,
        loss=number(train[-1], "loss") if train else None,
        speed=number(train[-1], "samples_per_second") if train else None,
        eta=eta(record, total) if state == "running" else None,
        nodes=nodes(record),
        restarts=restarts(record),
        metric=name,
        best=better(values) if values else None,
        test=number(test, name) if isinstance(test := (record.result or {}).get("test"), dict) else None,
        written=record.written,
        damaged=record.damaged,
    )


# ---------------------------------------------------------------- the state


def state_of(record: RunRecord, environment: Environment) -> str:
    """Return the state of a run.

    One of finished, queued, running, stalled, requeued, preempted, timeout, failed, stopped, lost, unfinished.
    """
    if record.result is not None:
        return "finished"
    begin = last_launch(record)
    if begin is None:
        return "unfinished"  # created by an older mmtrain, or by hand
    return _slurm_state(record, begin, environment) if begin.get("job") else _local_state(record, begin, environment)


def last_launch(record: RunRecord) -> Line | None:
    """Return the newest "submitted" or "started" line of the journal, or None."""
    begins = [line for line in record.journal if line["kind"] in ("submitted", "started")]
    return begins[-1] if begins else None


def _local_state(record: RunRecord, begin: Line, environment: Environment) -> str:
    """Return the state of a run that was started without Slurm."""
    ended = _end(record, begin)
    if ended:
        return _ended_state(ended)
    if begin.get("host") == environment.host and begin.get("pid") not in environment.pids:
        return "lost"
    quiet = "stalled" if begin.get("host") == environment.host else "lost"  # the processes of other hosts are unknown
    return quiet if is_quiet(record, begin, environment.now) else "running"


def _slurm_state(record: RunRecord, begin: Line, environment: Environment) -> str:
    """Return the state of a run that was last submitted to Slurm."""
    job, ended = str(begin["job"]), _end(record, begin)
    started = any(line["kind"] == "started" and str(line.get("job")) == job for line in record.journal)
    if environment.slurm is None:
        if ended:
            return "requeued" if ended.get("requeued") else _ended_state(ended)
        if not started:
            return "queued"
        return "lost" if is_quiet(record, begin, environment.now) else "running"
    now = environment.slurm.get(job)
    if now in WAITING:
        return "requeued" if started else "queued"
    if now in slurm.LIVE and ended is None:
        return "stalled" if is_quiet(record, begin, environment.now) else "running"
    if now in slurm.LIVE and ended and ended.get("requeued"):  # Slurm still shows the ended attempt
        return "requeued"
    if ended:
        return _ended_state(ended)
    if now == "CANCELLED":
        return "stopped"
    if now in _FAILED:
        return "failed"
    return "timeout" if now == "TIMEOUT" else "preempted" if now == "PREEMPTED" else "lost"


def _end(record: RunRecord, begin: Line) -> Line | None:
    """Return the "ended" line of the job that ``begin`` started, or None."""
    after = record.journal[record.journal.index(begin) + 1 :]
    ends = [line for line in after if line["kind"] == "ended" and str(line.get("job")) == str(begin.get("job"))]
    return ends[-1] if ends else None


def _ended_state(ended: Line) -> str:
    return str(ended.get("reason") or "lost")


def is_quiet(record: RunRecord, begin: Line, now: float) -> bool:
    """Return whether a run that started with the line ``begin`` has written nothing for longer than expected."""
    started = float(begin.get("time", 0))
    own = [line for line in record.metrics if float(line.get("time", 0)) >= started]
    step = step_seconds(record)
    if not any(line["kind"] == "train" for line in own) or step is None:
        return now - max(record.written, started) > (record.amount("parallel.start_timeout") or _START_TIMEOUT)
    # A line is written every log_every steps. An evaluation writes none until its end; allow twice its longest time.
    due = ((record.amount("train.log_every") or 1) + _QUIET_STEPS) * step
    evaluation = 2 * max(record.waits, default=0.0)
    return now - float(own[-1].get("time", 0)) > max(_QUIET, due, evaluation)


# ---------------------------------------------------------------- figures


def number(line: Line, name: str) -> float | None:
    """Return the value ``name`` of a line if it is a number, otherwise None."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > 2**63):
        return None
    return float(value)


def last_step(record: RunRecord) -> int:
    """Return the newest step in the metrics, or 0."""
    steps = [int(value) for line in record.metrics if (value := number(line, "step")) is not None]
    return max(steps, default=0)


def step_seconds(record: RunRecord) -> float | None:
    """Return the median time of a step over the lines that were read."""
    found = [value for line in record.of_kind("train") if (value := number(line, "step_seconds")) is not None]
    return statistics.median(found) if found else None


def total_steps(record: RunRecord) -> int | None:
    """Compute the number of steps of the run from its configuration and its last line of metrics.

    The line gives the number of training samples (samples consumed / epochs).
    """
    epochs, batch, most = (record.amount(f"train.{key}") for key in ("epochs", "batch_size", "max_steps"))
    for line in reversed(record.of_kind("train")):
        samples, epoch = number(line, "samples"), number(line, "epoch")
        if samples and epoch and epochs and batch:
            steps = math.ceil(epochs * (round(samples / epoch) / batch))
            return min(steps, int(most)) if most else steps
    return None


def eta(record: RunRecord, total: int | None) -> float | None:
    """Estimate the seconds to the last step from the median time of a step."""
    step = step_seconds(record)
    return None if total is None or step is None else max(total - last_step(record), 0) * step


def restarts(record: RunRecord) -> int:
    """Return the number of restarts. For old runs without ``jobs.jsonl``, count the "resume" lines of the metrics."""
    starts = sum(line["kind"] == "started" for line in record.journal)
    return starts - 1 if starts else len(record.of_kind("resume"))


def nodes(record: RunRecord) -> str | None:
    """Return the number of nodes that the run uses, or that it requested."""
    begin = last_launch(record)
    if begin is None:
        return None
    hosts = begin.get("hosts")
    if isinstance(hosts, list) and hosts:
        return str(len(set(map(str, hosts))))
    return str(begin["nodes"]) if begin.get("nodes") else "1" if begin.get("host") else None
