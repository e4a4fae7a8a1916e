"""``mmtrain submit``: start a run on Slurm, as several processes here, or as one in the foreground.

mmtrain submit --config vim2_base_in1k --nodes 4 --dry-run
mmtrain submit --config tsm2_etth1 --local 2 optim.lr=2e-4
mmtrain submit --config vim2_base_in1k --debug data=synthetic
mmtrain submit --resume runs/vim2_base_in1k --nodes 2
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mmtrain.cli.common import Overrides, RunDir
from mmtrain.cli.train import debug_run
from mmtrain.cluster import job
from mmtrain.cluster.local import leave_ranks, print_dry_run, run_local
from mmtrain.cluster.task import run_training
from mmtrain.config import ClusterConfig, RunConfig, load_config
from mmtrain.config.text import read_mapping
from mmtrain.errors import UserError
from mmtrain.runs.folder import run_path
from mmtrain.runs.logs import follow_job
from mmtrain.runs.slurm import has_slurm

#: What all runs of a user ask of the site's cluster: the keys of the section ``cluster``, in YAML.
SITE_FILE = Path("~/.config/mmtrain/cluster.yaml")


def submit_command(
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="A shipped configuration's name, or a YAML file.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, on other nodes too.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Slurm: number of nodes.")] = None,
    min_nodes: Annotated[int | None, typer.Option(help="Slurm may choose: this many nodes at least.")] = None,
    max_nodes: Annotated[int | None, typer.Option(help="Slurm may choose: this many nodes at most.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Slurm: GPUs and tasks a node; 0 for CPU nodes.")] = None,
    tasks_per_node: Annotated[int | None, typer.Option(help="Slurm: tasks on a node without GPUs.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Slurm: which GPU the plan reckons with, such as h100.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="Slurm: CPUs for each task.")] = None,
    mem: Annotated[str | None, typer.Option(help="Slurm: memory of a node, such as 200G.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm: quality of service.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: time limit of a job, such as 24:00:00.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Slurm: features that nodes must have.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Slurm: nodes to leave out, such as node3,node7.")] = None,
    reservation: Annotated[str | None, typer.Option(help="Slurm: reservation.")] = None,
    array_seeds: Annotated[
        str | None, typer.Option(help="A run for each seed, such as 0,1,2; --local: in turn.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's name (default: the configuration's).")] = None,
    run_dir: RunDir = None,
    cluster: Annotated[str, typer.Option(help="auto (Slurm where it is), slurm, local or debug.")] = "auto",
    local: Annotated[int | None, typer.Option(help="Run so many processes on this machine.")] = None,
    restarts: Annotated[int, typer.Option(help="With --local: start again so often after a rank was killed.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="One process, 2 steps, shrunken model, in front.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Slurm: show the log until the job ends.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run; touch nothing.")] = False,
) -> None:
    """Train a configuration. Starting a run in a folder that has checkpoints resumes it."""
    options = locals()
    leave_ranks()
    given = list(overrides or []) + ([f"name={name}"] if name is not None else [])
    site = job_settings({key: options[key] for key in ClusterConfig.model_fields if key in options})
    resolved, source, given, run_dir = resolve_run(config, resume, given, site, run_dir)
    where, seeds = choose_launcher(cluster, local, debug, nodes), seeds_of(array_seeds)
    if seeds and (where == "debug" or follow):
        raise UserError(f"--array-seeds makes several runs: leave out {'--debug' if where == 'debug' else '--follow'}")
    if where == "debug":
        if dry_run:
            print_dry_run(resolved, run_dir, "in this process, two steps of a shrunken model")
        else:
            run_training(*debug_run(resolved), debug=True)
    elif where == "local":
        for one, folder in job.of_seeds(resolved, run_dir, seeds):  # in turn; the first failure ends the row
            own = [*given, f"seed={one.seed}", f"name={one.name}"] if seeds else given
            run_local(one, 1 if local is None else local, source, own, folder, dry_run=dry_run, restarts=restarts)
    elif dry_run:
        print("\n\n".join(job.describe(one, folder) for one, folder in job.of_seeds(resolved, run_dir, seeds)))
    elif not has_slurm():
        raise UserError(
            "there is no sbatch on this machine, so nothing was submitted: run on a Slurm login node, or use"
            " --local N (processes here), --debug (two steps in front) or --dry-run (what would run)"
        )
    else:
        print(job.submit(resolved, run_dir, seeds))
        if follow:
            follow_job(run_path(resolved, run_dir).resolve())


def job_settings(asked: dict[str, Any]) -> list[str]:
    """Overrides of the section ``cluster``: those of the site's file, then those of the command line."""
    site = _site()
    if asked.get("nodes") is not None:  # a number on the command line replaces a range of the site
        site = {key: value for key, value in site.items() if key not in ("min_nodes", "max_nodes")}
    given = {key: value for key, value in asked.items() if value is not None}
    return [f"cluster.{key}={value}" for key, value in (site | given).items()]


def _site() -> dict[str, Any]:
    path = Path(os.environ.get("MMTRAIN_CLUSTER", SITE_FILE)).expanduser()
    if not path.is_file():
        return {}
    found = read_mapping(path)
    if any(isinstance(value, dict | list) for value in found.values()):
        raise UserError(f"{path} must hold lines such as `partition: gpu`: the keys of the section cluster")
    return found


def resolve_run(
    config: str | None, resume: Path | None, given: list[str], cluster: list[str], run_dir: str | None
) -> tuple[RunConfig, str, list[str], str | None]:
    """The configuration, its source and the overrides that make it from that, and the run folder where one is named.

    Raises:
        UserError: for a contradiction, a folder without a run, or a change of what a resumed run must keep.
    """
    if (config is None) == (resume is None):
        raise UserError("give --config NAME for a new run, or --resume RUN to go on with one (not both)")
    # what is written out on the command line beats the flags, which beat the site's file
    given = [*cluster, *given]
    if resume is None:
        return load_config(str(config), given), str(config), given, run_dir
    if run_dir is not None:
        raise UserError("--resume names the run folder: leave out --run-dir")
    if not (resume / "config.yaml").is_file():
        raise UserError(f"--resume {resume}: there is no run to go on with (no config.yaml): see mmtrain runs")
    source = str(resume / "config.yaml")
    return load_config(source, given), source, given, str(resume)


def choose_launcher(cluster: str, local: int | None, debug: bool, nodes: int | None) -> str:
    """slurm, local or debug.

    Raises:
        UserError: for flags that contradict each other.
    """
    if cluster not in ("auto", "slurm", "local", "debug"):
        raise UserError(f"--cluster {cluster}: choose auto, slurm, local or debug")
    if debug and local is not None:
        raise UserError("--debug runs one process in the foreground: leave out --local")
    if local is not None and nodes is not None:
        raise UserError("--nodes is for Slurm: leave it out with --local")
    flags = ["debug"] * debug + ["local"] * (local is not None)
    if flags and cluster not in ("auto", flags[0]):
        raise UserError(f"--cluster {cluster} and --{flags[0]} contradict each other: leave one out")
    return flags[0] if flags else "slurm" if cluster == "auto" else cluster


def seeds_of(text: str | None) -> Sequence[int]:
    """The seeds of ``0,1,2``.

    Raises:
        UserError: for anything else.
    """
    if text is None:
        return ()
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--array-seeds {text}: write whole numbers with commas between, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--array-seeds {text}: a seed comes twice")
    return seeds
