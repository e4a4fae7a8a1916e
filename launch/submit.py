"""Start a run: on Slurm, as several processes here, or as one in the foreground.

python launch/submit.py --config vim2_base_in1k --nodes 4 --dry-run
python launch/submit.py --config tsm2_etth1 --local 2 optim.lr=2e-4
python launch/submit.py --config vim2_base_in1k --debug data=synthetic
python launch/submit.py --resume runs/vim2_base_in1k --nodes 2
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtrain.cli import run_app
from mmtrain.cli.options import Overrides, RunDir
from mmtrain.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def submit(
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
    array_seeds: Annotated[str | None, typer.Option(help="One run for each seed, such as 0,1,2.")] = None,
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
    from mmtrain.cluster.settings import choose, job_settings, seeds_of, settings_of

    asked: dict[str, object] = {
        "nodes": nodes,
        "min_nodes": min_nodes,
        "max_nodes": max_nodes,
        "gpus_per_node": gpus_per_node,
    }
    asked |= {"tasks_per_node": tasks_per_node, "gpu": gpu, "cpus_per_task": cpus_per_task, "mem": mem}
    asked |= {"partition": partition, "account": account, "qos": qos, "time": time, "constraint": constraint}
    asked |= {"exclude": exclude, "reservation": reservation}
    given = list(overrides or []) + ([f"name={name}"] if name is not None else [])
    resolved, source, given, run_dir = settings_of(config, resume, given, job_settings(asked), run_dir)
    where = choose(cluster, local, debug, nodes)
    if where == "debug":
        from mmtrain.cluster.local import run_here

        run_here(resolved, run_dir, debug=True, dry_run=dry_run)
    elif where == "local":
        from mmtrain.cluster.local import run_local

        run_local(resolved, 1 if local is None else local, source, given, run_dir, dry_run=dry_run, restarts=restarts)
    elif dry_run:
        from mmtrain.cluster.job import describe

        print(describe(resolved, run_dir))
    else:
        from mmtrain.runs.slurm import has_slurm

        if not has_slurm():
            raise UserError(
                "there is no sbatch on this machine, so nothing was submitted: run on a Slurm login node, or use"
                " --local N (processes here), --debug (two steps in front) or --dry-run (what would run)"
            )
        from mmtrain.cluster.job import submit as submit_slurm

        print(submit_slurm(resolved, run_dir, seeds_of(array_seeds)))
        if follow:
            from mmtrain.cluster.settings import follow_run

            follow_run(resolved, run_dir)


if __name__ == "__main__":
    run_app(app)
