"""Train a configuration in its run folder, with one call."""

from __future__ import annotations

import traceback
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from mmtrain.config import RunConfig
from mmtrain.data.core.counts import WORKERS, check_count, set_threads
from mmtrain.errors import LostConnection
from mmtrain.log import log_to_file, logger
from mmtrain.parallel.build import check_strategy, needs_group, strategy_name
from mmtrain.parallel.preflight import check_ranks
from mmtrain.parallel.ranks import Ranks, collective_timeout, init_distributed, is_collective_error, world_size
from mmtrain.parallel.watchdog import Watchdog
from mmtrain.runs import journal
from mmtrain.runs.folder import RunFolder, run_path
from mmtrain.runs.hold import hold_folder
from mmtrain.tasks import Task, build_task
from mmtrain.train.build import build_meta_model, micro_batches
from mmtrain.train.loop import Outcome, Trainer
from mmtrain.train.optim import set_up_arithmetic
from mmtrain.train.trackers.sinks import check_installed
from mmtrain.train.trackers.tracker import Tracker

#: Number of samples of each split that a debug run uses.
_DEBUG_SAMPLES = 64


def train(config: RunConfig, run_dir: str | Path | None = None, *, debug: bool = False, check: bool = False) -> Outcome:
    """Train ``config`` in its run folder. Resume a run that was interrupted; do nothing if it is finished.

    Args:
        run_dir: the run folder. Default: ``run_root``/``name`` of the configuration.
        debug: use only the first samples of each split, and enable autograd's anomaly detection.
        check: first check that all ranks can communicate and see the same run folder.

    Returns:
        The last step, whether the run is finished, and its test metrics.

    Raises:
        UserError: if the data is invalid, the run folder belongs to another configuration, the ranks do not divide the
            batch, the disk is full, or another process trains in the folder.
    """
    run = RunFolder(run_path(config, run_dir))
    set_threads(config.threads)
    check_count("data.workers", config.data.workers, WORKERS)
    world = world_size()
    check_strategy(config, world)
    micros = micro_batches(config, world)
    set_up_arithmetic(config.train)
    parallel, group = config.parallel, needs_group(config.parallel, world)
    with (
        init_distributed(config.device, collective_timeout(parallel.start_timeout), group) as ranks,
        torch.autograd.set_detect_anomaly(debug),
        ExitStack() as locks,
    ):
        if check:
            summary = check_ranks(ranks, run.path, config.device)
            if ranks.main:
                logger.info("%s", summary)
        run.check(config)
        done = run.result()
        if done is not None:
            return Outcome(done["step"], finished=True, test=done["test"])
        check_installed(config)
        # Open the data before creating the folder, so that a run with missing data leaves no folder.
        task = build_task(config)
        task.check_batch(config.train.batch_size // (world * micros))
        if debug:
            task.shorten(_DEBUG_SAMPLES)
        ranks.on_main(lambda: _prepare(run, config, task, world, locks))
        with Watchdog(ranks, parallel.start_timeout, parallel.step_timeout, run.hangs) as watch:
            try:
                return _fit(config, task, run, ranks, watch, micros)
            except RuntimeError as error:
                if is_collective_error(error):
                    logger.error("communication between the ranks failed: %s", watch.describe())
                    _raise_briefly(run, ranks, error)
                raise


def _raise_briefly(run: RunFolder, ranks: Ranks, error: RuntimeError) -> None:
    """Write the traceback to a file and raise LostConnection. Return if the file cannot be written.

    The traceback shows where this rank waited for another one, which says little about the cause.
    """
    file = run.hangs / f"traceback_rank{ranks.rank:05d}.txt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)))
    except OSError:
        return
    # "[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26834. This is typically caused by …"
    reason = str(error).partition("] ")[2].partition(". ")[0] or type(error).__name__
    raise LostConnection(
        f"rank {ranks.rank} lost its connection to another rank ({reason[:120]}). Run the same command again to"
        f" continue from the last checkpoint. The traceback is in {file}"
    ) from error


def _fit(config: RunConfig, task: Task, run: RunFolder, ranks: Ranks, watch: Watchdog, micros: int) -> Outcome:
    tracker = Tracker(config, run, ranks, task.plotted)
    with run.writing(), closing(tracker), closing(Trainer(config, task, run, ranks, tracker, watch, micros)) as trainer:
        if ranks.main:
            _introduce(config, task, trainer)
        return trainer.fit()


def _prepare(run: RunFolder, config: RunConfig, task: Task, world: int, locks: ExitStack) -> None:
    """Create and lock the run folder, and write or check its files. The lock is released when ``locks`` is closed."""
    run.make()
    locks.enter_context(hold_folder(run.path))
    known = run.config_file.is_file() and run.assets_file.is_file()
    if known and run.data() is None and not config.data.accept_changes:  # version 0.1.0 stored no fingerprint
        task.check_assets(run.assets(), run.path)
    run.prepare(config, task.assets(), task.fingerprint)
    journal.record_start(run.path, world)
    log_to_file(run.log_file)


def _introduce(config: RunConfig, task: Task, trainer: Trainer) -> None:
    """Log one line about the run: model, number of samples, steps, ranks and strategy."""
    world, micros = trainer.ranks.world, trainer.micros
    parameters = sum(p.numel() for p in build_meta_model(task).parameters())
    logger.info(
        "%s: %s, %.2f M parameters, %d training samples, %d steps with %d samples each%s, on %d × %s%s",
        trainer.run.path,
        config.model.name,
        parameters / 1e6,
        len(task.train),
        trainer.schedule.steps,
        config.train.batch_size,
        f" ({micros} micro-batches per rank)" if micros > 1 else "",
        world,
        trainer.ranks.device.type,
        f" ({strategy_name(config.parallel, world)})" if world > 1 else "",
    )
    if micros > config.train.accumulation:
        logger.info(
            "using %d micro-batches per step instead of train.accumulation=%d, because of %d ranks and"
            " train.micro_batch=%s",
            micros,
            config.train.accumulation,
            world,
            config.train.micro_batch,
        )
