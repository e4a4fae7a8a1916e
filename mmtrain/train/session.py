"""One call from a configuration to a trained run folder."""

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

#: How many samples of each split a debug run looks at.
_DEBUG_SAMPLES = 64


def train(config: RunConfig, run_dir: str | Path | None = None, *, debug: bool = False, check: bool = False) -> Outcome:
    """Train ``config`` in its run folder, or go on there; a finished run is left alone.

    Args:
        run_dir: the run folder, where it is not ``run_root``/``name``.
        debug: only the first samples of each split, and autograd's anomaly detection.
        check: see first that the nodes can work together in the run folder.

    Raises:
        UserError: for bad data, a folder of another configuration, a batch that does not divide, a full disk, and a
            folder in which another process trains.
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
        ExitStack() as held,
    ):
        if check:
            seen = check_ranks(ranks, run.path, config.device)
            if ranks.main:
                logger.info("%s", seen)
        run.check(config)
        done = run.result()
        if done is not None:
            return Outcome(done["step"], finished=True, test=done["test"])
        check_installed(config)
        # the data is opened before the folder is made: a run whose data is missing leaves nothing behind
        task = build_task(config)
        task.check_batch(config.train.batch_size // (world * micros))
        if debug:
            task.shorten(_DEBUG_SAMPLES)
        ranks.on_main(lambda: _prepare(run, config, task, world, held))
        with Watchdog(ranks, parallel.start_timeout, parallel.step_timeout, run.hangs) as watch:
            try:
                return _fit(config, task, run, ranks, watch, micros)
            except RuntimeError as error:
                if is_collective_error(error):
                    logger.error("a collective operation failed: %s", watch.describe())
                    _raise_briefly(run, ranks, error)
                raise


def _raise_briefly(run: RunFolder, ranks: Ranks, error: RuntimeError) -> None:
    """Raise one message, with the traceback in a file: where this rank waited for another says little of the cause.

    Returns if the file cannot be written.
    """
    file = run.hangs / f"traceback_rank{ranks.rank:05d}.txt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)))
    except OSError:
        return
    # "[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26834. This is typically caused by …"
    said = str(error).partition("] ")[2].partition(". ")[0] or type(error).__name__
    raise LostConnection(
        f"rank {ranks.rank} lost its connection to another rank ({said[:120]}): the same command"
        f" continues from the last checkpoint; the traceback is in {file}"
    ) from error


def _fit(config: RunConfig, task: Task, run: RunFolder, ranks: Ranks, watch: Watchdog, micros: int) -> Outcome:
    tracker = Tracker(config, run, ranks, task.plotted)
    with run.writing(), closing(tracker), closing(Trainer(config, task, run, ranks, tracker, watch, micros)) as trainer:
        if ranks.main:
            _introduce(config, task, trainer)
        return trainer.fit()


def _prepare(run: RunFolder, config: RunConfig, task: Task, world: int, held: ExitStack) -> None:
    """Take the folder, which is given back when ``held`` ends, and make or check what is in it."""
    run.make()
    held.enter_context(hold_folder(run.path))
    known = run.config_file.is_file() and run.assets_file.is_file()
    if known and run.data() is None and not config.data.accept_changes:  # of an earlier version: no fingerprint
        task.check_assets(run.assets(), run.path)
    run.prepare(config, task.assets(), task.fingerprint)
    journal.record_start(run.path, world)
    log_to_file(run.log_file)


def _introduce(config: RunConfig, task: Task, trainer: Trainer) -> None:
    """Say in one line what is about to run."""
    world, micros = trainer.ranks.world, trainer.micros
    parameters = sum(p.numel() for p in build_meta_model(task).parameters())
    logger.info(
        "%s: %s, %.2f M parameters, %d training samples, %d steps of %d%s, on %d × %s%s",
        trainer.run.path,
        config.model.name,
        parameters / 1e6,
        len(task.train),
        trainer.schedule.steps,
        config.train.batch_size,
        f" in {micros} micro-batches" if micros > 1 else "",
        world,
        trainer.ranks.device.type,
        f" ({strategy_name(config.parallel, world)})" if world > 1 else "",
    )
    if micros > config.train.accumulation:
        logger.info(
            "train.accumulation is %d here, more than the %d asked for: %d ranks and train.micro_batch=%s want it so",
            micros,
            config.train.accumulation,
            world,
            config.train.micro_batch,
        )
