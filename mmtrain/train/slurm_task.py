"""What each task of a Slurm job runs: it finds its rank in Slurm's variables and trains."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from mmtrain.config import RunConfig
from mmtrain.errors import UserError


@dataclass
class SlurmTask:
    """Pickled by submitit, called in every task. It carries no checkpoint: the newest one is found at the start."""

    config: RunConfig
    run_dir: str

    def __call__(self) -> int:
        from mmtrain.cli.train import run_training
        from mmtrain.log import log_to_console

        os.environ.update(torch_variables(os.environ))
        log_to_console()
        run_training(self.config, self.run_dir)
        return 0


def torch_variables(slurm: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """torch's rendezvous variables from those of a Slurm step. The port follows from the job, so that jobs which
    share a node do not meet.

    Raises:
        UserError: outside a Slurm step.
    """
    try:
        job, nodes = int(slurm["SLURM_JOB_ID"]), slurm["SLURM_JOB_NODELIST"]
        rank, world, local = (slurm[f"SLURM_{name}"] for name in ("PROCID", "NTASKS", "LOCALID"))
    except KeyError as error:
        raise UserError(f"{error.args[0]} is not set: this must run inside a Slurm step (srun)") from None
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": slurm.get("SLURM_NTASKS_PER_NODE", "1"),
        "MASTER_ADDR": names.stdout.split()[0],
        "MASTER_PORT": str(20000 + job % 10000),
    }
