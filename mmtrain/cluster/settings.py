"""From the words of the command line to a configuration, a run folder, and the place where it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.config import RunConfig, load_config
from mmtrain.config.load import refuse_bare_time
from mmtrain.errors import UserError

#: What all runs of a user ask of the site's cluster: the keys of the section ``cluster``, in YAML.
SITE_FILE = Path("~/.config/mmtrain/cluster.yaml")


def job_settings(asked: dict[str, Any]) -> list[str]:
    """Overrides of the section ``cluster``: those of the site's file, then those of the command line."""
    site = _site()
    if asked.get("nodes") is not None:  # a number on the command line replaces a range of the site
        site = {key: value for key, value in site.items() if key not in ("min_nodes", "max_nodes")}
    given = {key: value for key, value in asked.items() if value is not None}
    return [f"cluster.{key}={value}" for key, value in (site | given).items()]


def _site() -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(os.environ.get("MMTRAIN_CLUSTER", SITE_FILE)).expanduser()
    if not path.is_file():
        return {}
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(found, dict) or any(isinstance(value, dict | list) for value in found.values()):
        raise UserError(f"{path} must hold lines such as `partition: gpu`: the keys of the section cluster")
    refuse_bare_time(found, str(path))
    return {str(key): value for key, value in found.items()}


def settings_of(
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


def choose(cluster: str, local: int | None, debug: bool, nodes: int | None) -> str:
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


def follow_run(config: RunConfig, run_dir: str | None) -> None:
    """Print the log of rank 0 until the run's job is gone from the queue; Ctrl-C leaves the job alone."""
    import time

    from mmtrain.cli.runs import go_on
    from mmtrain.runs import journal, slurm
    from mmtrain.runs.folder import run_path

    run = run_path(config, run_dir).resolve()
    job, shown = journal.last_job(run), 0
    log = run / "slurm" / f"{job}_0_log.err"
    try:
        while True:
            live = job is not None and slurm.is_live(job)
            if log.is_file():
                shown = go_on(log, shown)
            if not live:
                return
            time.sleep(2)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; mmtrain runs logs {run} --follow shows it again")
