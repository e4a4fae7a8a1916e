"""``mmtrain submit``: start a run on Slurm, in several processes on this machine, or as one in the foreground."""

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

#: The user's settings for the cluster of the site: a YAML file with keys of the section ``cluster``.
SITE_FILE = Path("~/.config/mmtrain/cluster.yaml")


def submit_command(
    overrides: Overrides = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="Name of a configuration (see mmtrain configs), or a YAML file."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Resume the run in this folder; the number of nodes may differ.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Slurm: number of nodes.")] = None,
    min_nodes: Annotated[
        int | None, typer.Option(help="Slurm: minimum number of nodes, if the job may start with fewer than --nodes.")
    ] = None,
    max_nodes: Annotated[
        int | None, typer.Option(help="Slurm: maximum number of nodes, if the job may start with more than --nodes.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="Slurm: GPUs per node, with one task each; 0 for CPU nodes.")
    ] = None,
    tasks_per_node: Annotated[int | None, typer.Option(help="Slurm: tasks per node that has no GPUs.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Type of GPU for the plan of --dry-run, such as h100.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="Slurm: CPUs per task.")] = None,
    mem: Annotated[str | None, typer.Option(help="Slurm: memory per node, such as 200G.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm: quality of service.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: time limit of a job, such as 24:00:00.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Slurm: features that the nodes must have.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Slurm: nodes not to use, such as node3,node7.")] = None,
    reservation: Annotated[str | None, typer.Option(help="Slurm: reservation.")] = None,
    array_seeds: Annotated[
        str | None,
        typer.Option(
            help="Seeds, such as 0,1,2: start one run for each, as a Slurm job array, or in turn with --local."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (default: that of the configuration).")] = None,
    run_dir: RunDir = None,
    cluster: Annotated[
        str, typer.Option(help="Where to run: slurm, local, debug, or auto (slurm unless --local or --debug is given).")
    ] = "auto",
    local: Annotated[int | None, typer.Option(help="Number of processes to run on this machine.")] = None,
    restarts: Annotated[int, typer.Option(help="With --local: maximum number of restarts after a rank is killed.")] = 0,
    debug: Annotated[
        bool, typer.Option("--debug", help="Run two steps of a shrunken model, in one process in the foreground.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Slurm: print the log until the job ends.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and change nothing.")] = False,
) -> None:
    """Start or resume a run: on Slurm, with --local on this machine, or with --debug in the foreground.

    A run whose folder contains checkpoints is resumed from the newest one.

    \b
    Examples:
      mmtrain submit --config vim2_digits --local 1 optim.lr=1e-3 name=my_run    # this machine
      mmtrain submit --config tsm2_etth1 --local 2                               # two processes, same result
      mmtrain submit --config vim2_digits --local 2 parallel.strategy=fsdp       # or ddp, hsdp, zero1, zero2, zero3
      mmtrain submit --config vim2_base_in1k --debug data=synthetic              # two steps of a shrunken model
      mmtrain submit --config vim2_base_in1k --nodes 4 --dry-run                 # print the Slurm job and its plan
      mmtrain submit --config vim2_base_in1k --nodes 4                           # submit it; requeued until done
      mmtrain submit --resume runs/vim2_base_in1k --nodes 2                      # resume, on fewer nodes
    """
    options = locals()
    leave_ranks()
    given = list(overrides or []) + ([f"name={name}"] if name is not None else [])
    site = job_settings({key: options[key] for key in ClusterConfig.model_fields if key in options})
    resolved, source, given, run_dir = resolve_run(config, resume, given, site, run_dir)
    where, seeds = choose_launcher(cluster, local, debug, nodes), seeds_of(array_seeds)
    if seeds and (where == "debug" or follow):
        raise UserError(f"--array-seeds starts several runs: leave out {'--debug' if where == 'debug' else '--follow'}")
    if where == "debug":
        if dry_run:
            print_dry_run(resolved, run_dir, "in this process, two steps of a shrunken model")
        else:
            run_training(*debug_run(resolved), debug=True)
    elif where == "local":
        for one, folder in job.of_seeds(resolved, run_dir, seeds):  # in turn, until one fails
            used = [*given, f"seed={one.seed}", f"name={one.name}"] if seeds else given
            run_local(one, 1 if local is None else local, source, used, folder, dry_run=dry_run, restarts=restarts)
    elif dry_run:
        print("\n\n".join(job.describe(one, folder) for one, folder in job.of_seeds(resolved, run_dir, seeds)))
    elif not has_slurm():
        raise UserError(
            "sbatch was not found on this machine, so nothing was submitted. Run this on a Slurm login node, or use"
            " --local N (processes on this machine), --debug (two steps in the foreground) or --dry-run"
        )
    else:
        print(job.submit(resolved, run_dir, seeds))
        if follow:
            follow_job(run_path(resolved, run_dir).resolve())


def job_settings(flags: dict[str, Any]) -> list[str]:
    """Return overrides of the section ``cluster``: those of the site's file, replaced by flags that are not None."""
    site = _site()
    if flags.get("nodes") is not None:  # --nodes replaces a range of nodes in the site's file
        site = {key: value for key, value in site.items() if key not in ("min_nodes", "max_nodes")}
    given = {key: value for key, value in flags.items() if value is not None}
    return [f"cluster.{key}={value}" for key, value in (site | given).items()]


def _site() -> dict[str, Any]:
    path = Path(os.environ.get("MMTRAIN_CLUSTER", SITE_FILE)).expanduser()
    if not path.is_file():
        return {}
    found = read_mapping(path)
    if any(isinstance(value, dict | list) for value in found.values()):
        raise UserError(f"{path}: must contain keys of the section cluster only, such as `partition: gpu`")
    return found


def resolve_run(
    config: str | None, resume: Path | None, given: list[str], cluster: list[str], run_dir: str | None
) -> tuple[RunConfig, str, list[str], str | None]:
    """Resolve the configuration of a new or resumed run.

    Args:
        config: Value of ``--config``.
        resume: Value of ``--resume``. Exactly one of the two is given.
        given: Overrides from the command line.
        cluster: Overrides from the flags and the site's file.
        run_dir: Value of ``--run-dir``.

    Returns:
        The configuration, the name or file it was read from, all overrides, and the run folder if one was named.

    Raises:
        UserError: If the flags contradict each other, or the folder contains no run.
    """
    if (config is None) == (resume is None):
        raise UserError("give either --config NAME for a new run, or --resume RUN to resume one")
    # later overrides win: the command line over the flags, the flags over the site's file
    given = [*cluster, *given]
    if resume is None:
        return load_config(str(config), given), str(config), given, run_dir
    if run_dir is not None:
        raise UserError("--resume already names the run folder: leave out --run-dir")
    if not (resume / "config.yaml").is_file():
        raise UserError(
            f"--resume {resume}: this folder contains no run (no config.yaml). `mmtrain runs` lists the runs"
        )
    source = str(resume / "config.yaml")
    return load_config(source, given), source, given, str(resume)


def choose_launcher(cluster: str, local: int | None, debug: bool, nodes: int | None) -> str:
    """Return ``slurm``, ``local`` or ``debug``.

    Raises:
        UserError: If the flags contradict each other.
    """
    if cluster not in ("auto", "slurm", "local", "debug"):
        raise UserError(f"--cluster {cluster}: choose auto, slurm, local or debug")
    if debug and local is not None:
        raise UserError("--debug runs one process in the foreground: leave out --local")
    if local is not None and nodes is not None:
        raise UserError("--nodes applies to Slurm: leave it out with --local")
    flags = ["debug"] * debug + ["local"] * (local is not None)
    if flags and cluster not in ("auto", flags[0]):
        raise UserError(f"--cluster {cluster} and --{flags[0]} contradict each other: leave one out")
    return flags[0] if flags else "slurm" if cluster == "auto" else cluster


def seeds_of(text: str | None) -> Sequence[int]:
    """Parse a list of seeds such as ``0,1,2``.

    Raises:
        UserError: If the text is no such list, or a seed occurs twice.
    """
    if text is None:
        return ()
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--array-seeds {text}: write integers separated by commas, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--array-seeds {text}: a seed occurs twice. Name each seed once")
    return seeds
