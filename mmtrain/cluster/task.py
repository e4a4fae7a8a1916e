"""What each task of a Slurm job runs: it finds its rank in Slurm's variables and trains."""

from __future__ import annotations

import json
import os
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path

from mmtrain.config import RunConfig
from mmtrain.errors import UserError
from mmtrain.runs import slurm
from mmtrain.runs.journal import JobAttempt


@dataclass
class SlurmTask:
    """Pickled by submitit, called in every task. It carries no checkpoint: the newest one is found at the start.

    A run that was stopped by a signal ends without an error: whether the job comes back is decided after all tasks have
    ended, in :mod:`mmtrain.cluster.requeue`, from what they leave in the run folder.
    """

    config: RunConfig
    run_dir: str

    def __call__(self) -> int:
        from mmtrain.train.preemption import StopRequest

        attempt, run = JobAttempt.current(), Path(self.run_dir)
        rank = int(os.environ.get("SLURM_PROCID", "0"))
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
        from mmtrain.log import log_to_console
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
