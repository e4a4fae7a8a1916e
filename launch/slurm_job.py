"""The Slurm job of a run, through submitit: one task for each GPU."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.config import RunConfig
from mmtrain.errors import UserError
from mmtrain.plan import Plan, plan_run
from mmtrain.plan.report import render
from mmtrain.train.session import run_path
from mmtrain.train.slurm_task import SlurmTask

logger = logging.getLogger("mmtrain")


def parameters(config: RunConfig) -> dict[str, Any]:
    """submitit's names for the job that ``config.cluster`` asks for.

    One task a GPU, or a task a node without GPUs; a task that fails ends the others.
    """
    cluster = config.cluster
    site = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "mem": cluster.mem,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
    }
    extra = {"requeue": True} | ({"reservation": cluster.reservation} if cluster.reservation else {})
    gpus = {"gpus_per_node": cluster.gpus_per_node} if cluster.gpus_per_node else {}
    return {
        "job_name": config.name,
        "time": cluster.time,
        "nodes": cluster.nodes,
        "ntasks_per_node": max(cluster.gpus_per_node, 1),
        "cpus_per_task": cluster.cpus_per_task,
        **gpus,
        **{key: value for key, value in site.items() if value is not None},
        "srun_args": ["--kill-on-bad-exit=1"],
        "additional_parameters": extra,
    }


def describe(config: RunConfig, run_dir: str | None) -> str:
    """What would be submitted: the run folder, the size of the job and the sbatch script. Touches nothing."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = _job_folder(config, run_dir)
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    script = _make_sbatch_string(command=command, folder=folder, **parameters(config))
    world = config.cluster.nodes * max(config.cluster.gpus_per_node, 1)
    batch, parts = config.train.batch_size, world * config.train.accumulation
    share = f"{batch // parts} samples per rank and micro-batch"
    if batch % parts:
        share = f"which does not divide by {world} ranks × accumulation {config.train.accumulation}: this would fail"
    plan = _plan(config)
    lines = [
        f"run folder: {run_path(config, run_dir)}",
        f"model: {config.model.name}, global batch {batch}, {share}",
        f"ranks: {config.cluster.nodes} nodes × {max(config.cluster.gpus_per_node, 1)} = {world}",
        "",
        plan if isinstance(plan, str) else render(plan),
        "",
        "would submit:",
        "",
        script.rstrip(),
    ]
    return "\n".join(lines)


def warn_of_misfits(config: RunConfig) -> None:
    """Warn of a job that would be refused, or run out of memory, once it starts."""
    plan = _plan(config)
    for warning in [] if isinstance(plan, str) else plan.warnings:
        logger.warning("by the plan (mmtrain plan): %s", warning)


def _plan(config: RunConfig) -> Plan | str:
    """The plan of the job, or why there is none: that must not keep anyone from submitting."""
    cluster = config.cluster
    if not cluster.gpus_per_node:
        return "plan: none, since cluster.gpus_per_node is 0"
    try:
        return plan_run(config, cluster.nodes, cluster.gpus_per_node, cluster.gpu)
    except UserError as error:
        return f"plan: none, since {error}"


def submit(config: RunConfig, run_dir: str | None) -> str:
    """Submit the job; returns what to tell the user."""
    import submitit

    warn_of_misfits(config)
    folder = _job_folder(config, run_dir)
    executor = submitit.SlurmExecutor(folder=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executor.update_parameters(**parameters(config))
    path = run_path(config, run_dir).resolve()
    job = executor.submit(SlurmTask(config, str(path)))
    return _next_steps(job.job_id, path, folder)


def _next_steps(job_id: str, path: Path, folder: Path) -> str:
    rows: Sequence[tuple[str, str]] = (
        ("job", job_id),
        ("run folder", str(path)),
        ("watch", f"tail -F {folder}/{job_id}_0_log.err"),
        ("state", f"squeue -j {job_id}; mmtrain runs {path.parent}"),
        ("stop", f"scancel {job_id}"),
        ("go on", "submit the same command again: it resumes from the newest checkpoint"),
    )
    return "\n".join(f"{name:<11}{text}" for name, text in rows)


def _job_folder(config: RunConfig, run_dir: str | None) -> Path:
    return run_path(config, run_dir).resolve() / "slurm"
