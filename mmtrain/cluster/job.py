"""Submission of a run as a Slurm job, through submitit, with one task per GPU."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mmtrain.cluster import requeue
from mmtrain.cluster.task import SlurmTask
from mmtrain.config import RunConfig, replace
from mmtrain.errors import UserError
from mmtrain.log import logger
from mmtrain.runs import journal, slurm
from mmtrain.runs.folder import RunFolder, run_path
from mmtrain.runs.hold import live_holder, refusal

if TYPE_CHECKING:
    from mmtrain.plan import Plan


#: Seconds that a job needs to start and to take some steps, in addition to its margin.
_LEAST_TIME = 30

#: Unicode categories that must not occur in a line of text: control characters, surrogates, and separators of lines
#: and paragraphs.
_NOT_IN_A_LINE = ("Cc", "Cs", "Zl", "Zp")

#: File systems in the memory of one node, which other nodes cannot see.
_FILE_SYSTEMS_OF_ONE_NODE = ("tmpfs", "ramfs", "devtmpfs")


def parameters(config: RunConfig, run: Path) -> dict[str, Any]:
    """Return submitit's parameters for the job described by ``config.cluster``.

    The job has one task per GPU, or ``cluster.tasks_per_node`` tasks per node without GPUs. If one task fails, Slurm
    ends the others.

    Args:
        config: The configuration of the run.
        run: The absolute path of the run folder.

    Raises:
        UserError: If a value contains a character that a batch script cannot contain.
    """
    _refuse_what_breaks_a_line(config, run)
    cluster = config.cluster
    site = {key: getattr(cluster, key) for key in ("partition", "account", "qos", "mem", "constraint", "exclude")}
    extra = {"requeue": True, "open-mode": "append", "signal": f"{cluster.signal}@{cluster.margin}"}
    extra |= {"reservation": cluster.reservation} if cluster.reservation else {}
    extra |= {"nodes": cluster.node_range} if cluster.max_nodes else {}
    gpus = {"gpus_per_node": cluster.gpus_per_node} if cluster.gpus_per_node else {}
    return {
        "job_name": config.name,
        "time": cluster.time,
        "nodes": cluster.max_nodes or cluster.nodes,
        "ntasks_per_node": cluster.tasks,
        "cpus_per_task": cluster.cpus_per_task,
        **gpus,
        **{key: value for key, value in site.items() if value is not None},
        "srun_args": ["--kill-on-bad-exit=1"],
        "additional_parameters": extra,
        "setup": _around(config, run),
    }


def _around(config: RunConfig, run: Path) -> list[str]:
    """Return the lines of the batch script before srun.

    They make the script ignore signals, and run ``mmtrain.cluster.requeue`` when srun has ended.
    """
    cluster = config.cluster
    command = [sys.executable, "-m", "mmtrain.cluster.requeue", "--margin", str(cluster.margin)]
    command += ["--max-losses", str(cluster.max_losses)]
    command += ["--max-timeouts", str(cluster.max_timeouts)] if cluster.max_timeouts is not None else []
    command += ["--replace-nodes"] if cluster.replace_nodes else []
    root = Path(__file__).resolve().parents[2]
    return [
        "# the tasks handle signals; this script waits until they have ended",
        "trap : TERM USR1 USR2 CONT",
        f"export PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "# a function, because the string of a trap would have to be quoted twice",
        "mmtrain_at_exit() {",
        f'  {shlex.join([*command, str(run)])} "$?"',
        "  exit $?",
        "}",
        "trap mmtrain_at_exit EXIT",
    ]


def _refuse_what_breaks_a_line(config: RunConfig, run: Path) -> None:
    """Refuse characters that would end a line of the batch script, or that it cannot contain.

    Quoting does not help, because Slurm reads the ``#SBATCH`` lines one by one and removes every backslash.

    Raises:
        UserError: Names the key and the character.
    """
    values = {f"cluster.{key}": value for key, value in config.cluster if isinstance(value, str)}
    for key, value in {**values, "name": config.name, "the run folder": str(run)}.items():
        for character in value:
            if character == "\\" or unicodedata.category(character) in _NOT_IN_A_LINE:
                raise UserError(f"{key} is {value!r}: Slurm does not accept the character {character!r}. Remove it")
    if "%" in str(run):
        raise UserError(
            f"the run folder is {str(run)!r}: Slurm interprets % in the names of log files. Choose a folder without %"
            " with name=…, run_root=… or --run-dir"
        )


def describe(config: RunConfig, run_dir: str | None) -> str:
    """Return the text of a dry run: run folder, size of the job, plan and sbatch script. Writes no file."""
    from submitit.slurm.slurm import _make_sbatch_string

    from mmtrain.plan import render

    path = run_path(config, run_dir).resolve()
    folder = path / "slurm"
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    script = _make_sbatch_string(command=command, folder=folder, **parameters(config, path))
    cluster = config.cluster
    world = (cluster.max_nodes or cluster.nodes) * cluster.tasks
    batch, micro_batches = config.train.batch_size, world * config.train.accumulation
    share = f"{batch // micro_batches} samples per rank and micro-batch"
    if batch % micro_batches:
        share = f"not divisible by {world} ranks × accumulation {config.train.accumulation}: this would fail"
    plan = _plan(config)
    shown = plan if isinstance(plan, str) else render(plan)
    return (
        f"run folder: {run_path(config, run_dir)}\nmodel: {config.model.name}, global batch {batch}, {share}\n"
        f"ranks: {cluster.node_range} nodes × {cluster.tasks} = {world}\n\n{shown}\n\n"
        f"would submit:\n\n{script.rstrip()}"
    )


def warn_of_misfits(config: RunConfig) -> None:
    """Log the warnings of the plan, such as too little memory, before the job waits in the queue."""
    plan = _plan(config)
    for warning in [] if isinstance(plan, str) else plan.warnings:
        logger.warning("the plan (mmtrain plan) warns: %s", warning)


def _plan(config: RunConfig) -> Plan | str:
    """Return the plan of the job, or the reason why there is none. A job without a plan can still be submitted."""
    cluster = config.cluster
    if not cluster.gpus_per_node:
        return "plan: none, because cluster.gpus_per_node is 0"
    from mmtrain.plan import plan_run  # imports torch, which a job without GPUs does not need here

    try:
        return plan_run(config, cluster.max_nodes or cluster.nodes, cluster.gpus_per_node, cluster.gpu)
    except UserError as error:
        return f"plan: none: {error}"


def of_seeds(config: RunConfig, run_dir: str | None, seeds: Sequence[int]) -> list[tuple[RunConfig, str | None]]:
    """Return the configuration and run folder of each seed, or the given ones if there are no seeds."""
    if not seeds:
        return [(config, run_dir)]
    return [
        (
            replace(config, seed=seed, name=f"{config.name}_seed{seed}"),
            None if run_dir is None else f"{run_dir}_seed{seed}",
        )
        for seed in seeds
    ]


def submit(config: RunConfig, run_dir: str | None, seeds: Sequence[int] = ()) -> str:
    """Submit one job, or one per seed, and return a message for the user.

    Raises:
        UserError: If the job could never finish, the run folder is in use or belongs to another configuration, or Slurm
            refuses the job.
    """
    if seeds:
        return "\n\n".join(submit(one, folder) for one, folder in of_seeds(config, run_dir, seeds))
    path = run_path(config, run_dir).resolve()
    settings = parameters(config, path)
    _check(config, path)
    warn_of_misfits(config)
    folder = path / "slurm"
    import submitit

    executor = submitit.SlurmExecutor(folder=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executor.update_parameters(**settings)
    (path / requeue.STOP).unlink(missing_ok=True)
    try:
        job = executor.submit(SlurmTask(config, str(path)))
    except submitit.core.utils.FailedJobError as error:
        raise UserError(_refusal(str(error))) from None
    journal.record(path, "submitted", job=job.job_id, nodes=config.cluster.node_range, tasks=config.cluster.tasks)
    rows = {
        "job": job.job_id,
        "run folder": path,
        "watch": f"mmtrain runs logs {path} --follow",
        "state": f"mmtrain runs {path.parent}",
        "stop": f"mmtrain runs stop {path}",
        "resume": f"mmtrain submit --resume {path}",
    }
    return "\n".join(f"{name:<11}{text}" for name, text in rows.items())


def _check(config: RunConfig, path: Path) -> None:
    """Refuse a job that could not run, before it waits in the queue, and create the run folder."""
    cluster = config.cluster
    run = RunFolder(path)
    run.check(config)
    if run.result() is not None:
        raise UserError(f"{path}: this run is finished. Give a new run another name=… or --run-dir")
    job = journal.last_job(path)
    if job is not None and slurm.is_live(job):
        raise UserError(
            f"{path}: job {job} of this run is still in the queue. Stop it first with mmtrain runs stop {path}"
        )
    if (holder := live_holder(path)) is not None:
        raise refusal(path, holder)
    limit = slurm.parse_duration(cluster.time)
    if limit is None:
        raise UserError(
            f"cluster.time (--time) is {cluster.time!r}: write it in Slurm's format, such as 24:00:00 or 2-12:00:00"
        )
    if limit < cluster.margin + _LEAST_TIME:
        raise UserError(
            f"--time {cluster.time} leaves no time to train: the run saves cluster.margin = {cluster.margin} s before"
            f" the limit and needs {_LEAST_TIME} s to start. Raise --time or lower cluster.margin"
        )
    nodes = cluster.min_nodes or cluster.nodes
    if nodes > (available := _nodes_of(cluster.partition)):
        where = f"partition {cluster.partition}" if cluster.partition else "the cluster"
        raise UserError(f"--nodes {nodes}: {where} has only {available}, so the job would never start. Lower --nodes")
    run.make()
    kind = _file_system(path)
    if kind in _FILE_SYSTEMS_OF_ONE_NODE and (cluster.max_nodes or cluster.nodes) > 1:
        raise UserError(
            f"{path} is in the memory of this machine ({kind}), which other nodes cannot see. Choose a folder on shared"
            " storage with --run-dir or run_root=…"
        )


def _nodes_of(partition: str | None) -> int:
    """Return the number of nodes of the partition (default: of the cluster).

    If sinfo does not know the partition, return a large number and leave the refusal to sbatch.
    """
    lines = _query("sinfo", "-h", "-N", "-o", "%N", *(["-p", partition] if partition else []))
    return len(set(lines.split(", "))) if lines else 10**9


def _file_system(path: Path) -> str:
    """Return the type of the file system that contains ``path``, or "" if it is unknown."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""


def _refusal(output: str) -> str:
    """Return sbatch's error message in one line, followed by a likely cure."""
    message = next((line for line in output.splitlines() if "error:" in line), output.strip().splitlines()[-1])
    message = re.sub(r"^.*?error: *", "", message).strip()
    cures = (
        # (text in the message, cure, format with which sinfo lists the valid values)
        ("partition", "--partition must be one of: ", "%R"),
        ("account", "--account must be one of yours (sacctmgr show associations user=$USER)", ""),
        ("qos", "--qos must be one that your account may use (sacctmgr show qos)", ""),
        ("reservation", "see scontrol show reservation", ""),
        ("cpu count", "no node has enough CPUs for its tasks; nodes have: ", "%c CPUs"),
        ("configuration", "no node has the requested resources; nodes have: ", "%G and %c CPUs"),
        ("gres", "no node has these GPUs; nodes have: ", "%G"),
        ("time limit", "--time is above the partition's limit: ", "%R %l"),
    )
    found = ((cure, columns) for key, cure, columns in cures if key in message.lower())
    cure, columns = next(found, ("see the manual of sbatch", ""))
    return f"Slurm refused the job: {message}. {cure}{_query('sinfo', '-h', '-o', columns) if columns else ''}"


def _query(*command: str) -> str:
    """Return the distinct lines of a command's output, joined by commas."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return ", ".join(dict.fromkeys(done.stdout.split("\n"))).strip(", ")
