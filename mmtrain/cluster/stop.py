"""Stopping of runs: a run saves a checkpoint, ends and is not requeued."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from mmtrain.cluster.requeue import STOP
from mmtrain.errors import UserError
from mmtrain.runs import slurm
from mmtrain.runs.reader import RunRecord, check_run_folder, read_run
from mmtrain.runs.status import WAITING, last_launch, runs_training

_RESUME = "the command that started the run resumes it from the newest checkpoint"


def stop_run(run: str) -> str:
    """Stop the run in the folder ``run``. Return a message that says what was done and how to resume.

    Raises:
        UserError: If the run is not training, or cannot be reached from this machine.
    """
    record = read_run(check_run_folder(run), recent=1)
    if record.result is not None:
        raise UserError(f"{run}: this run is finished, so there is nothing to stop")
    begin = last_launch(record)
    if begin is None:
        raise UserError(
            f"{run}: there is no jobs.jsonl, so mmtrain does not know where this run trains. Stop it with Ctrl-C where"
            " it was started"
        )
    done = _stop_job(record, str(begin["job"])) if begin.get("job") else _stop_process(record, begin)
    return f"{done}\n{_RESUME}"


def _stop_job(record: RunRecord, job: str) -> str:
    if not slurm.has_slurm():
        raise UserError(
            f"{record.path} runs as Slurm job {job}, but this machine has no Slurm. Stop it on a login node"
        )
    known = slurm.query_states([job])
    if known is None:
        raise UserError(f"{record.path} runs as Slurm job {job}, but Slurm does not answer. Check with squeue")
    state = known.get(job)
    if state not in slurm.LIVE:
        raise UserError(
            f"{record.path}: nothing to stop, because its last job {job} has ended ({state or 'unknown to Slurm'})"
        )
    if state in WAITING:
        _scancel(job)
        return f"job {job} was waiting ({state.lower()}) and has been cancelled"
    with _requested(record):
        _scancel("--signal=USR2", job)
    return (
        f"job {job} will save, end and not be requeued (SIGUSR2 was sent to all its steps)\n"
        f"watch it with `mmtrain runs logs {record.path} --follow`; `scancel {job}` ends it at once"
    )


@contextmanager
def _requested(record: RunRecord) -> Iterator[None]:
    """Write the stop request before the signal is sent, so that the ending job finds it; remove it on failure."""
    request = record.path / STOP
    request.touch()
    try:
        yield
    except (UserError, OSError, subprocess.SubprocessError):
        request.unlink(missing_ok=True)
        raise


def _scancel(*arguments: str) -> None:
    done = subprocess.run(["scancel", *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise UserError(f"scancel {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")


def _stop_process(record: RunRecord, begin: dict[str, object]) -> str:
    host, pid = begin.get("host"), begin.get("pid")
    if host != socket.gethostname():
        raise UserError(f"{record.path} runs on another machine, {host}. Call `mmtrain runs stop` there")
    if not isinstance(pid, int) or not runs_training(pid):
        raise UserError(f"{record.path}: nothing to stop, because its process ({pid}) has ended")
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        raise UserError(f"{record.path}: process {pid} belongs to another user. Ask them to stop it") from None
    except ProcessLookupError:
        raise UserError(f"{record.path}: nothing to stop, because its process ({pid}) has ended") from None
    return f"process {pid} will save and end (SIGTERM was sent)"
