"""``mmtrain train``, the command of every process of a run, and ``mmtrain configs``.

This module does not import torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import typer

from mmtrain.cli.common import Config, Overrides, RunDir
from mmtrain.cluster.task import SlurmTask, run_training
from mmtrain.config import RunConfig, load_config, replace, to_yaml
from mmtrain.config.load import config_folders, config_names
from mmtrain.log import logger
from mmtrain.runs.folder import run_path


def train_command(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    slurm: bool = typer.Option(False, help="Run as one task of a Slurm job (srun): see slurm/train.sbatch."),
    debug: bool = typer.Option(False, help="Run two steps of a shrunken model, with anomaly detection."),
    print_config: bool = typer.Option(False, help="Print the resolved configuration and exit."),
) -> None:
    """Start or resume a run in this process, or as one rank of torchrun or Slurm.

    \b
    Examples:
      mmtrain train --config vim2_digits
      mmtrain train --config vim2_digits --print-config optim.lr=1e-3
      torchrun --nproc-per-node 2 -m mmtrain train --config vim2_digits
    """
    resolved = load_config(config, overrides or ())
    if print_config:
        print(to_yaml(resolved), end="")
    elif slurm:
        SlurmTask(resolved, str(run_path(resolved, run_dir).resolve()))()
    elif debug:
        run_training(*debug_run(resolved), debug=True)
    else:
        run_training(resolved, run_dir)


def configs_command() -> None:
    """List the configurations that --config takes by name: those in ./configs and those included in mmtrain."""
    listed: set[str] = set()
    for folder in config_folders():
        names = [name for name in config_names([folder]) if name not in listed]
        if names:
            print(f"{folder}:")
        width = max(map(len, names), default=0) + 2
        for name in names:
            first, *_ = (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines() or [""]
            description = first.lstrip("# ") if first.startswith("#") else ""
            print(f"  {name:<{width}}{description}".rstrip())
        listed.update(names)


def debug_run(config: RunConfig) -> tuple[RunConfig, Path]:
    """Return the shrunken configuration of a debug run and its run folder, which is deleted first."""
    run_dir = Path(config.run_root) / "debug" / config.name
    shutil.rmtree(run_dir, ignore_errors=True)
    logger.info("debug: 2 steps of a shrunken model on 64 samples of each split. The results have no meaning")
    return shrink(config), run_dir


def shrink(config: RunConfig) -> RunConfig:
    """Return a small and short copy of ``config`` that uses the same code paths."""
    smallest = config.train.accumulation * 2
    train = replace(config.train, max_steps=2, batch_size=max(smallest, 4), log_every=1)
    return replace(
        config,
        model=config.model.shrunk(),
        train=train,
        data=replace(config.data, workers=0),
        eval=replace(config.eval, every_steps=2, batch_size=16),
        tracking=replace(config.tracking, wandb="disabled"),
    )
