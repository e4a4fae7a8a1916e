"""What each process of a run does: it trains, as a task of a Slurm job or by itself, and leaves word how it ended.

Only training itself imports torch, which takes seconds: the signals of a Slurm job are listened to before that.
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
    """Train, say how it ended and what to do next. Exits with 128 + signal after a signal stopped it."""
    from mmtrain.train.session import train

    path = run_path(config, run_dir)
    try:
        outcome = train(config, run_dir, debug=debug)
    except BaseException:
        _note_end(path, "failed")
        raise
    _note_end(path, "finished" if outcome.finished else "stopped")
    if outcome.stopped_by is not None:
        logger.info("stopped at step %d with a checkpoint in %s: the same command goes on", outcome.step, path)
        sys.exit(128 + outcome.stopped_by)
    shown = ", ".join(f"{k} {v:.4g}" for k, v in (outcome.test or {}).items())
    logger.info("done: %s at step %d%s", path, outcome.step, f", test: {shown}" if shown else "")
    curves = RunFolder(path).curves_file
    drawn = f"curves: {curves}   " if curves.is_file() else ""
    logger.info("%suse it: mmtrain predict %s FILE", drawn, path)


def _note_end(run: Path, reason: str) -> None:
    """Note how a run without Slurm ended; what a Slurm job comes to is noted when all its tasks have ended."""
    if journal.began_here(run):
        with contextlib.suppress(OSError):  # a folder that cannot be written was why the run ended, and was told
            journal.record(run, "ended", job=None, restart=0, reason=reason, step=newest_step(run), requeued=False)


@dataclass
class SlurmTask:
    """Pickled by submitit, called in every task. It carries no checkpoint: the newest one is found at the start.

    A run that was stopped by a signal ends without an error: whether the job comes back is decided after all tasks have
    ended, in :mod:`mmtrain.cluster.requeue`, from what they leave in the run folder.
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
        """When rank 0 leaves by its own clock: the time limit may not be announced."""
        left = slurm.seconds_left(attempt.job) if rank == 0 else None
        return max(left - self.config.cluster.margin, 0.0) if left is not None else None

    def _train(self, run: Path) -> None:
        os.environ.update(torch_variables(os.environ))
        from mmtrain.train.session import train

        log_to_console()
        train(self.config, run, check=self.config.cluster.check_ranks)


def _report(attempt: JobAttempt, run: Path, rank: int, error: BaseException) -> None:
    """Leave for the user, and for what decides about another job, what ended this rank."""
    from mmtrain.parallel.preflight import NodesAtFault
    from mmtrain.parallel.ranks import is_collective_error

    text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    report = {
        "rank": rank,
        "node": socket.gethostname(),
        "error": f"{type(error).__name__}: {error}",
        "text": text,
        "bad_nodes": error.nodes if isinstance(error, NodesAtFault) else [],
        # it lost its connection to a rank that ended before
        "follows": isinstance(error, RuntimeError) and is_collective_error(error),
    }
    folder = attempt.failure_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(report, indent=1))


def torch_variables(slurm_variables: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """torch's rendezvous variables from those of a Slurm step. The port follows from the job, so that jobs which
    share a node do not meet.

    Raises:
        UserError: outside a Slurm step.
    """
    try:
        job, nodes = int(slurm_variables["SLURM_JOB_ID"]), slurm_variables["SLURM_JOB_NODELIST"]
        rank, world, local = (slurm_variables[f"SLURM_{name}"] for name in ("PROCID", "NTASKS", "LOCALID"))
    except KeyError as error:
        raise UserError(f"{error.args[0]} is not set: this must run inside a Slurm step (srun)") from None
    return {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": slurm_variables.get("SLURM_NTASKS_PER_NODE", "1"),
        "MASTER_ADDR": slurm.hostnames(nodes)[0],
        "MASTER_PORT": str(20000 + job % 10000),
    }
