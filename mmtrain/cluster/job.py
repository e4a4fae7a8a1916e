"""The Slurm job of a run, through submitit: one task for each GPU."""

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


#: A job needs so many seconds to start and to take some steps, beside its margin.
_LEAST = 30

#: Unicode's categories of characters that are no part of a line of text: control characters, halves of characters, and
#: separators of lines and paragraphs.
_NOT_IN_A_LINE = ("Cc", "Cs", "Zl", "Zp")

_FILE_SYSTEMS_OF_ONE_NODE = ("tmpfs", "ramfs", "devtmpfs")


def parameters(config: RunConfig, run: Path) -> dict[str, Any]:
    """submitit's names for the job that ``config.cluster`` asks for.

    One task a GPU, or a task a node without GPUs; a task that fails ends the others.

    Raises:
        UserError: for a value that Slurm cannot be given.
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
    """Lines of the batch script before its srun: what is done when that ends, and that no signal ends it before."""
    cluster = config.cluster
    words = [sys.executable, "-m", "mmtrain.cluster.requeue", "--margin", str(cluster.margin)]
    words += ["--max-losses", str(cluster.max_losses)]
    words += ["--max-timeouts", str(cluster.max_timeouts)] if cluster.max_timeouts is not None else []
    words += ["--replace-nodes"] if cluster.replace_nodes else []
    root = Path(__file__).resolve().parents[2]
    return [
        "# signals are for the tasks: this script waits for them",
        "trap : TERM USR1 USR2 CONT",
        f"export PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "# in a function, so that every value is quoted once",
        "mmtrain_at_exit() {",
        f'  {shlex.join([*words, str(run)])} "$?"',
        "  exit $?",
        "}",
        "trap mmtrain_at_exit EXIT",
    ]


def _refuse_what_breaks_a_line(config: RunConfig, run: Path) -> None:
    """Refuse characters that would end a line of the batch script, or that cannot be written to it.

    Quoting does not help: Slurm reads its options line by line, and drops a backslash wherever it stands.

    Raises:
        UserError: with the key and the character.
    """
    values = {f"cluster.{key}": value for key, value in config.cluster if isinstance(value, str)}
    for key, value in {**values, "name": config.name, "the run folder": str(run)}.items():
        for character in value:
            if character == "\\" or unicodedata.category(character) in _NOT_IN_A_LINE:
                raise UserError(f"{key} is {value!r}: {character!r} must not be in what is given to Slurm; remove it")
    if "%" in str(run):
        raise UserError(
            f"the run folder is {str(run)!r}: Slurm replaces what follows % in the names of logs; choose a folder"
            " without % with name=…, run_root=… or --run-dir"
        )


def describe(config: RunConfig, run_dir: str | None) -> str:
    """What would be submitted: the run folder, the size of the job and the sbatch script. Touches nothing."""
    from submitit.slurm.slurm import _make_sbatch_string

    from mmtrain.plan import render

    path = run_path(config, run_dir).resolve()
    folder = path / "slurm"
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    script = _make_sbatch_string(command=command, folder=folder, **parameters(config, path))
    cluster = config.cluster
    world = (cluster.max_nodes or cluster.nodes) * cluster.tasks
    batch, parts = config.train.batch_size, world * config.train.accumulation
    share = f"{batch // parts} samples per rank and micro-batch"
    if batch % parts:
        share = f"which does not divide by {world} ranks × accumulation {config.train.accumulation}: this would fail"
    plan = _plan(config)
    shown = plan if isinstance(plan, str) else render(plan)
    return (
        f"run folder: {run_path(config, run_dir)}\nmodel: {config.model.name}, global batch {batch}, {share}\n"
        f"ranks: {cluster.node_range} nodes × {cluster.tasks} = {world}\n\n{shown}\n\n"
        f"would submit:\n\n{script.rstrip()}"
    )


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
    from mmtrain.plan import plan_run  # brings torch, for which a job without GPUs need not wait

    try:
        return plan_run(config, cluster.max_nodes or cluster.nodes, cluster.gpus_per_node, cluster.gpu)
    except UserError as error:
        return f"plan: none, since {error}"


def of_seeds(config: RunConfig, run_dir: str | None, seeds: Sequence[int]) -> list[tuple[RunConfig, str | None]]:
    """The configuration and the run folder of each seed; those that are given without seeds."""
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
    """Submit the job, or one a seed; returns what to tell the user.

    Raises:
        UserError: for what Slurm, or the run folder, would refuse, and what could never finish.
    """
    if seeds:
        return "\n\n".join(submit(one, folder) for one, folder in of_seeds(config, run_dir, seeds))
    path = run_path(config, run_dir).resolve()
    asked = parameters(config, path)
    _check(config, path)
    warn_of_misfits(config)
    folder = path / "slurm"
    import submitit

    executor = submitit.SlurmExecutor(folder=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executor.update_parameters(**asked)
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
        "go on": f"mmtrain submit --resume {path}",
    }
    return "\n".join(f"{name:<11}{text}" for name, text in rows.items())


def _check(config: RunConfig, path: Path) -> None:
    """Refuse what could not run, before it waits in a queue."""
    cluster = config.cluster
    run = RunFolder(path)
    run.check(config)
    if run.result() is not None:
        raise UserError(f"{path}: this run is finished; give a new one another name=… or --run-dir")
    job = journal.last_job(path)
    if job is not None and slurm.is_live(job):
        raise UserError(
            f"{path}: job {job} of this run is still in the queue: end it first with mmtrain runs stop {path}"
        )
    if (holder := live_holder(path)) is not None:
        raise refusal(path, holder)
    limit = slurm.parse_duration(cluster.time)
    if limit is None:
        raise UserError(
            f"cluster.time (--time) is {cluster.time!r}: write it as Slurm does, such as 24:00:00 or 2-12:00:00"
        )
    if limit < cluster.margin + _LEAST:
        raise UserError(
            f"--time {cluster.time} leaves no time to train: the run saves cluster.margin = {cluster.margin} s before"
            f" the limit and needs {_LEAST} s to start. Raise --time, or lower cluster.margin"
        )
    wanted = cluster.min_nodes or cluster.nodes
    if wanted > (there := _nodes_of(cluster.partition)):
        where = f"partition {cluster.partition}" if cluster.partition else "the cluster"
        raise UserError(f"--nodes is {wanted}, more than {where} has ({there}): the job would wait for ever")
    run.make()
    kind = _file_system(path)
    if kind in _FILE_SYSTEMS_OF_ONE_NODE and (cluster.max_nodes or cluster.nodes) > 1:
        raise UserError(
            f"{path} lies in the memory of this machine ({kind}), which other nodes do not see: choose a folder on"
            " shared storage with --run-dir or run_root=…"
        )


def _nodes_of(partition: str | None) -> int:
    """How many nodes the partition has, or the cluster; a partition that is not there is for sbatch to refuse."""
    lines = _ask("sinfo", "-h", "-N", "-o", "%N", *(["-p", partition] if partition else []))
    return len(set(lines.split(", "))) if lines else 10**9


def _file_system(path: Path) -> str:
    """The kind of file system that ``path`` lies on; empty where the system does not tell."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""


def _refusal(words: str) -> str:
    """sbatch's refusal in one line, with what may be meant."""
    said = next((line for line in words.splitlines() if "error:" in line), words.strip().splitlines()[-1])
    said = re.sub(r"^.*?error: *", "", said).strip()
    cures = (
        # what is in the refusal, the cure, and what sinfo is to add to it
        ("partition", "--partition must be one of: ", "%R"),
        ("account", "--account must be one of yours (sacctmgr show associations user=$USER)", ""),
        ("qos", "--qos must be one that your account may use (sacctmgr show qos)", ""),
        ("reservation", "see scontrol show reservation", ""),
        ("cpu count", "no node has so many CPUs for its tasks; nodes have: ", "%c CPUs"),
        ("configuration", "no node has what is asked for; nodes have: ", "%G and %c CPUs"),
        ("gres", "no node has these GPUs; nodes have: ", "%G"),
        ("time limit", "--time is above the partition's limit: ", "%R %l"),
    )
    found = ((cure, asked) for key, cure, asked in cures if key in said.lower())
    cure, asked = next(found, ("see sbatch's manual", ""))
    return f"Slurm refused the job: {said}. {cure}{_ask('sinfo', '-h', '-o', asked) if asked else ''}"


def _ask(*command: str) -> str:
    asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return ", ".join(dict.fromkeys(asked.stdout.split("\n"))).strip(", ")
