"""Start a run: on Slurm, as several processes here, or as one in the foreground.

python launch/submit.py --config vim2_base_in1k --nodes 4 --dry-run
python launch/submit.py --config tsm2_etth1 --local 2 optim.lr=2e-4
python launch/submit.py --config vim2_base_in1k --debug data=synthetic
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmtrain.cli import run_app
from mmtrain.cli.options import Config, Overrides, RunDir
from mmtrain.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Slurm: number of nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Slurm: GPUs and tasks a node; 0 for CPU nodes.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Slurm: which GPU the plan reckons with, such as h100.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm: quality of service.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: time limit, such as 24:00:00.")] = None,
    name: Annotated[str | None, typer.Option(help="The run's name (default: the configuration's).")] = None,
    run_dir: RunDir = None,
    local: Annotated[int | None, typer.Option(help="Run so many processes on this machine.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="One process, 2 steps, shrunken model, in front.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run; touch nothing.")] = False,
) -> None:
    """Train a configuration. Starting a run in a folder that has checkpoints resumes it."""
    from mmtrain.config import load_config

    given = list(overrides or [])
    asked = {"nodes": nodes, "gpus_per_node": gpus_per_node, "partition": partition, "account": account}
    asked |= {"qos": qos, "time": time, "gpu": gpu}
    given += [f"cluster.{key}={value}" for key, value in asked.items() if value is not None]
    if name is not None:
        given.append(f"name={name}")
    resolved = load_config(config, given)
    if debug and local is not None:
        raise UserError("--debug runs one process in the foreground: leave out --local")
    if local is not None and nodes is not None:
        raise UserError("--nodes is for Slurm: leave it out with --local")
    if debug:
        from local_job import run_here

        run_here(resolved, run_dir, debug=True, dry_run=dry_run)
    elif local is not None:
        from local_job import run_local

        run_local(resolved, local, config, given, run_dir, dry_run=dry_run)
    elif dry_run:
        from slurm_job import describe

        print(describe(resolved, run_dir))
    elif shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on this machine, so nothing was submitted: run on a Slurm login node, or use"
            " --local N (processes here), --debug (two steps in front) or --dry-run (what would run)"
        )
    else:
        from slurm_job import submit as submit_slurm

        print(submit_slurm(resolved, run_dir))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    run_app(app)
