"""The process of a rank: it trains, as a task of a Slurm job or alone, and records how it ended.

torch is imported late, because this takes seconds and the handlers for the signals of Slurm must be installed first.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from mmtrain.config import RunConfig
from mmtrain.errors import UserError, environment_number
from mmtrain.log import log_to_console, logger
from mmtrain.runs import journal, slurm
from mmtrain.runs.folder import RunFolder, newest_step, run_path
from mmtrain.runs.journal import JobAttempt
from mmtrain.train.preemption import StopRequest


def run_training(config: RunConfig, run_dir: str | Path | None = None, debug: bool = False) -> None:
    """Train, then log how the run ended and what to do next.

    Raises:
        SystemExit: With status 128 + signal, if a signal stopped the run.
    """
    from mmtrain.train.session import train

    path = run_path(config, run_dir)
    try:
        outcome = train(config, run_dir, debug=debug)
    except BaseException:
        _note_end(path, "failed")
        raise
    _note_end(path, "finished" if outcome.finished else "stopped")
    if outcome.stopped_by is not None:
        logger.info("stopped at step %d with a checkpoint in %s: the same command resumes it", outcome.step, path)
        sys.exit(128 + outcome.stopped_by)
    shown = ", ".join(f"{k} {v:.4g}" for k, v in (outcome.test or {}).items())
    logger.info("done: %s at step %d%s", path, outcome.step, f", test: {shown}" if shown else "")
    curves = RunFolder(path).curves_file
    drawn = f"curves: {curves}   " if curves.is_file() else ""
    logger.info("%suse the model: mmtrain predict %s FILE", drawn, path)


def _note_end(run: Path, reason: str) -> None:
    """Record how a run without Slurm ended. For a Slurm job, mmtrain.cluster.requeue does this after all tasks."""
    if journal.began_here(run):
        with contextlib.suppress(OSError):  # an unwritable folder has already ended the run with its own message
            journal.record(run, "ended", job=None, restart=0, reason=reason, step=newest_step(run), requeued=False)


@dataclass
class SlurmTask:
    """The function of a Slurm task, pickled by submitit. It resumes from the newest checkpoint in the run folder.

    A task that was stopped by a signal ends without an error. :mod:`mmtrain.cluster.requeue` decides from the files in
    the run folder whether the job is requeued, after all tasks have ended.
    """

    config: RunConfig
    run_dir: str

    def __call__(self) -> int:
        attempt, run = JobAttempt.current(), Path(self.run_dir)
        rank = environment_number("SLURM_PROCID", 0)
        with StopRequest(self._seconds(attempt, rank)) as stop:
            try:
                self._train(run)
            except BaseException as error:
                _report(attempt, run, rank, error)
                raise
            if rank == 0 and not (run / "result.json").exists():
                attempt.note_clean_stop(run, stop.received.name if stop.received else "SIGTERM")
        return 0

    def _seconds(self, attempt: JobAttempt, rank: int) -> float | None:
        """Return after how many seconds rank 0 stops by itself, since Slurm may not announce the time limit."""
        left = slurm.seconds_left(attempt.job) if rank == 0 else None
        return max(left - self.config.cluster.margin, 0.0) if left is not None else None

    def _train(self, run: Path) -> None:
        os.environ.update(torch_variables(os.environ))
        from mmtrain.train.session import train

        log_to_console()
        train(self.config, run, check=self.config.cluster.check_ranks)


def _report(attempt: JobAttempt, run: Path, rank: int, error: BaseException) -> None:
    """Write the error of this rank to the run folder, for the user and for the decision about requeueing."""
    from mmtrain.parallel.preflight import NodesAtFault
    from mmtrain.parallel.ranks import is_collective_error

    text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    report = {
        "rank": rank,
        "node": socket.gethostname(),
        "error": f"{type(error).__name__}: {error}",
        "text": text,
        "bad_nodes": error.nodes if isinstance(error, NodesAtFault) else [],
        # true if the error is only the lost connection to a rank that failed earlier
        "follows": isinstance(error, RuntimeError) and is_collective_error(error),
    }
    folder = attempt.failure_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(report, indent=1))


def torch_variables(slurm_variables: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Return torch's rendezvous variables, computed from those of a Slurm step.

    The port depends on the job id, so that two jobs on one node use different ports.

    Raises:
        UserError: Outside a Slurm step.
    """
    try:
        job, nodes = int(slurm_variables["SLURM_JOB_ID"]), slurm_variables["SLURM_JOB_NODELIST"]
        rank, world, local = (slurm_variables[f"SLURM_{name}"] for name in ("PROCID", "NTASKS", "LOCALID"))
    except KeyError as error:
        raise UserError(f"{error.args[0]} is not set. Run this command inside a Slurm step (srun)") from None
    return {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": slurm_variables.get("SLURM_NTASKS_PER_NODE", "1"),
        "MASTER_ADDR": slurm.hostnames(nodes)[0],
        "MASTER_PORT": str(20000 + job % 10000),
    }
