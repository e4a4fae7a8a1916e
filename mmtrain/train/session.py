"""One call from a configuration to a trained run folder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mmtrain.config import RunConfig
from mmtrain.errors import UserError
from mmtrain.log import log_to_file
from mmtrain.parallel.ranks import joined
from mmtrain.tasks import build_task
from mmtrain.train.loop import Outcome, Trainer
from mmtrain.train.run_folder import RunFolder
from mmtrain.train.tracking import Tracker

logger = logging.getLogger("mmtrain")


#: How many samples of each split a debug run looks at.
_DEBUG_SAMPLES = 64


def run_path(config: RunConfig, run_dir: str | Path | None = None) -> Path:
    """The run folder: ``run_dir`` if given, else ``run_root``/``name``."""
    return Path(run_dir) if run_dir is not None else Path(config.run_root) / config.name


def train(config: RunConfig, run_dir: str | Path | None = None, *, debug: bool = False) -> Outcome:
    """Train ``config`` in its run folder, or go on there; a finished run is left alone.

    Args:
        run_dir: the run folder, where it is not ``run_root``/``name``.
        debug: only the first samples of each split, and autograd's anomaly detection.

    Raises:
        UserError: for bad data, a folder of another configuration, a batch that does not divide, a full disk.
    """
    run = RunFolder(run_path(config, run_dir))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with joined(config.device) as ranks:
        local = _local_batch(config, ranks.world)
        run.check(config)
        done = run.result()
        if done is not None:
            return Outcome(done["step"], finished=True, test=done["test"])
        # the data is opened before the folder is made: a run whose data is missing leaves nothing behind
        task = build_task(config)
        task.check_batch(local)
        if debug:
            task.shorten(_DEBUG_SAMPLES)
        if ranks.main:
            run.prepare(config, task.assets())
            log_to_file(run.log_file)
        ranks.barrier()
        tracker = Tracker(config, run, ranks, task.plotted)
        try:
            trainer = Trainer(config, task, run, ranks, tracker)
            if ranks.main:
                parameters = sum(p.numel() for p in trainer.model.parameters())
                logger.info(
                    "%s: %s, %.2f M parameters, %d training samples, %d steps of %d, on %d × %s",
                    run.path,
                    config.model.name,
                    parameters / 1e6,
                    len(task.train),
                    trainer.schedule.steps,
                    config.train.batch_size,
                    ranks.world,
                    ranks.device.type,
                )
            with torch.autograd.set_detect_anomaly(debug):
                return trainer.fit()
        finally:
            tracker.close()


def _local_batch(config: RunConfig, world: int) -> int:
    """Samples per rank and micro-batch."""
    batch, parts = config.train.batch_size, world * config.train.accumulation
    if batch % parts:
        fits = [n for n in range(1, batch + 1) if batch % n == 0][-8:]
        raise UserError(
            f"train.batch_size is {batch}, which {world} ranks × train.accumulation={config.train.accumulation} do not"
            f" divide: use a multiple of {parts}, or so many ranks × accumulation: {', '.join(map(str, fits))}"
        )
    return batch // parts
