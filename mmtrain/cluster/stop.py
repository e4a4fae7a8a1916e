"""Ask a run to save and end, for good: it is not queued again."""

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

_GO_ON = "go on with the same command that started it: it resumes from the newest checkpoint"


def stop_run(run: str) -> str:
    """Stop what trains in the folder ``run``; returns what was done and how to go on.

    Raises:
        UserError: when nothing trains there, or where it cannot be reached from here.
    """
    record = read_run(check_run_folder(run), recent=1)
    if record.result is not None:
        raise UserError(f"{run} is finished: there is nothing to stop")
    begin = last_launch(record)
    if begin is None:
        raise UserError(
            f"{run} has no jobs.jsonl, so it is not known where it runs: stop it where it was started (Ctrl-C)"
        )
    done = _stop_job(record, str(begin["job"])) if begin.get("job") else _stop_process(record, begin)
    return f"{done}\n{_GO_ON}"


def _stop_job(record: RunRecord, job: str) -> str:
    if not slurm.has_slurm():
        raise UserError(f"{record.path} runs as Slurm job {job}, and there is no Slurm here: stop it on a login node")
    known = slurm.query_states([job])
    if known is None:
        raise UserError(f"{record.path} runs as Slurm job {job}, and Slurm does not answer here: see what squeue says")
    state = known.get(job)
    if state not in slurm.LIVE:
        raise UserError(f"{record.path}: its last job, {job}, has ended ({state or 'unknown to Slurm'}): nothing runs")
    if state in WAITING:
        _scancel(job)
        return f"job {job} was waiting ({state.lower()}), and is cancelled"
    with _requested(record):
        _scancel("--signal=USR2", job)
    return (
        f"job {job} is asked to save and end (SIGUSR2 to all its steps), and will not be queued again\n"
        f"watch it with `mmtrain runs logs {record.path} --follow`; `scancel {job}` ends it at once"
    )


@contextmanager
def _requested(record: RunRecord) -> Iterator[None]:
    """The request is in the folder before the signal, for the end of the job to see; it goes if the signal fails."""
    request = record.path / STOP
    request.touch()
    try:
        yield
    except (UserError, OSError, subprocess.SubprocessError):
        request.unlink(missing_ok=True)
        raise


def _scancel(*words: str) -> None:
    done = subprocess.run(["scancel", *words], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise UserError(f"scancel {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


def _stop_process(record: RunRecord, begin: dict[str, object]) -> str:
    host, pid = begin.get("host"), begin.get("pid")
    if host != socket.gethostname():
        raise UserError(f"{record.path} runs on {host}, not here: run `mmtrain runs stop` there")
    if not isinstance(pid, int) or not runs_training(pid):
        raise UserError(f"{record.path}: its process ({pid}) is gone: nothing runs there")
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        raise UserError(f"{record.path}: process {pid} is another user's: ask them to stop it") from None
    except ProcessLookupError:
        raise UserError(f"{record.path}: its process ({pid}) is gone: nothing runs there") from None
    return f"process {pid} is asked to save and end (SIGTERM)"
