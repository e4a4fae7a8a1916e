"""``mmtrain train`` and what every launcher calls."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmtrain.cli.options import Config, Overrides, RunDir

if TYPE_CHECKING:
    from mmtrain.config import RunConfig

logger = logging.getLogger("mmtrain")


def train_command(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    slurm: bool = typer.Option(False, help="As one task of a Slurm job (srun): see slurm/train.sbatch."),
    debug: bool = typer.Option(False, help="Two steps of a shrunken model, with anomaly detection."),
    print_config: bool = typer.Option(False, help="Print the resolved configuration and stop."),
) -> None:
    """Train in this process (or as one rank of torchrun), or go on with the run in its folder."""
    from mmtrain.config import load_config, to_yaml

    resolved = load_config(config, overrides or ())
    if print_config:
        print(to_yaml(resolved), end="")
        return
    if slurm:
        from mmtrain.cluster.task import SlurmTask
        from mmtrain.runs.folder import run_path

        SlurmTask(resolved, str(run_path(resolved, run_dir).resolve()))()
    else:
        run_training(resolved, run_dir, debug=debug)


def run_training(config: RunConfig, run_dir: str | Path | None = None, debug: bool = False) -> None:
    """Train, say how it ended and what to do next. Exits with 128 + signal after a signal stopped it."""
    from mmtrain.runs.folder import run_path
    from mmtrain.train.session import train

    if debug:
        config, run_dir = shrink(config), Path(config.run_root) / "debug" / config.name
        shutil.rmtree(run_dir, ignore_errors=True)
        logger.info("debug: a shrunken model, 2 steps, 64 samples of each split: no figure here means anything")
    path = run_path(config, run_dir)
    try:
        outcome = train(config, run_dir, debug=debug)
    except BaseException:
        _note_end(path, "failed")
        raise
    _note_end(path, "finished" if outcome.finished else "stopped")
    if outcome.stopped_by is not None:
        logger.info("stopped at step %d with a checkpoint in %s: the same command goes on", outcome.step, path)
        sys.exit(128 + outcome.stopped_by)
    shown = ", ".join(f"{k} {v:.4g}" for k, v in (outcome.test or {}).items())
    logger.info("done: %s at step %d%s", path, outcome.step, f", test: {shown}" if shown else "")
    logger.info("curves: %s   use it: mmtrain predict %s FILE", path / "curves.png", path)


def _note_end(run: Path, reason: str) -> None:
    """Note how a run without Slurm ended; what a Slurm job comes to is noted when all its tasks have ended."""
    from mmtrain.runs import journal
    from mmtrain.runs.journal import newest_step

    if os.environ.get("RANK", "0") == "0" and "SLURM_JOB_ID" not in os.environ and (run / journal.NAME).exists():
        with contextlib.suppress(OSError):  # a folder that cannot be written was why the run ended, and was told
            journal.record(run, "ended", job=None, restart=0, reason=reason, step=newest_step(run), requeued=False)


def shrink(config: RunConfig) -> RunConfig:
    """A small and short copy of ``config`` that takes the same code paths."""
    from mmtrain.config import TSM2Config, ViM2Config, replace

    model = config.model
    if isinstance(model, ViM2Config):
        few = [2] * len(model.dims)
        model = replace(model, dims=[8 * 2**i for i in range(len(few))], token_mixers=few)
    elif isinstance(model, TSM2Config):
        model = replace(model, dim=8, depth=1)
    parts = config.train.accumulation * 2
    train = replace(config.train, max_steps=2, batch_size=max(parts, 4), log_every=1)
    return replace(
        config,
        model=model,
        train=train,
        data=replace(config.data, workers=0),
        eval=replace(config.eval, every_steps=2, batch_size=16),
        tracking=replace(config.tracking, wandb="disabled"),
    )
