"""Comparison of the trainer's time per step with that of a handwritten loop, for the same model and batches.

Both run in one process, in alternating blocks of steps (trainer, bare, bare, trainer, ...), so that other load on the
machine affects both. The trainer is the real one, in its ``fit``; a hook at the top of its loop runs the bare loop
between two blocks. All outputs of the trainer are enabled: metrics, log, progress, timings, utilisation. A block is as
long as the interval between two lines of metrics, so each block of the trainer includes one. Garbage collection is
disabled in both, as the trainer does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import RunConfig, load_config
from mmtrain.data.core.loader import train_batches
from mmtrain.log import log_to_file
from mmtrain.models import build_model
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.watchdog import Watchdog
from mmtrain.runs.folder import RunFolder
from mmtrain.tasks import Batch, build_task
from mmtrain.train.build import micro_batches
from mmtrain.train.loop import Trainer
from mmtrain.train.optim import learning_rate
from mmtrain.train.trackers.tracker import Tracker
from trainer_parts.figure import Figure, median_of


class _Enough(Exception):
    """Ends ``fit`` when all blocks are measured."""


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


class Blocks:
    """Seconds per step of each block: wall-clock time, and CPU time of all threads of the process."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def add(self, begun: tuple[float, float], steps: int) -> None:
        wall, cpu = _now()
        self.wall.append((wall - begun[0]) / steps)
        self.cpu.append((cpu - begun[1]) / steps)


class BareLoop:
    """Training loop as one writes it without a framework: AdamW, loss, backward pass, clipping, step."""

    def __init__(self, config: RunConfig, batches: Iterator[Batch], loss: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.config, self.batches, self.loss = config, batches, loss
        torch.manual_seed(config.seed)
        self.model = build_model(config.model).train()
        self.parameters = list(self.model.parameters())
        exempt = [p for p in self.parameters if p.ndim <= 1 or getattr(p, "_no_weight_decay", False)]
        chosen = {id(p) for p in exempt}
        groups = [
            {"params": [p for p in self.parameters if id(p) not in chosen], "weight_decay": config.optim.weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=tuple(config.optim.betas), fused=True)
        self.step = 0

    def run(self, steps: int) -> None:
        limit = self.config.optim.clip_norm or float("inf")
        for _ in range(steps):
            batch = next(self.batches)
            loss = self.loss(self.model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, limit)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config.optim, self.step, 10**6, 1000)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1


class _Between:
    """Replacement of the trainer's profiler, called before each step: times the blocks and runs the bare loop."""

    bare: BareLoop

    def __init__(self, block: int, pairs: int, warm_up: int) -> None:
        self.block, self.pairs, self.warm_up = block, pairs, warm_up
        self.trainer, self.bare_ones = Blocks(), Blocks()
        self._seen = 0
        self._begun = _now()

    def __enter__(self) -> _Between:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def step(self, number: int) -> None:
        done, self._seen = self._seen, self._seen + 1
        if done < self.warm_up or (done - self.warm_up) % self.block:
            return
        if done == self.warm_up:
            self.bare.run(max(2, self.warm_up // 2))
        else:
            self.trainer.add(self._begun, self.block)
            # trainer, bare, bare, trainer, trainer, ...: two bare blocks after every other block
            while len(self.bare_ones.wall) < min((len(self.trainer.wall) + 1) // 2 * 2, self.pairs):
                begun = _now()
                self.bare.run(self.block)
                self.bare_ones.add(begun, self.block)
            if len(self.trainer.wall) == self.pairs:
                raise _Enough
        self._begun = _now()


def compare(config: RunConfig, folder: Path, block: int, pairs: int, models: int) -> tuple[Blocks, Blocks]:
    """Return the blocks of the trainer and of the bare loop, where equal indices are successive in time.

    The pairs are spread over ``models`` pairs of new models, because the memory addresses of a model change its speed
    by some percent. In every other pair the model of the bare loop is created first.
    """
    trainer, bare = Blocks(), Blocks()
    for number in range(models):
        for all_blocks, blocks in zip(
            (trainer, bare),
            _compare_two(config, folder / str(number), block, pairs // models, bare_first=number % 2 == 0),
            strict=True,
        ):
            all_blocks.wall += blocks.wall
            all_blocks.cpu += blocks.cpu
    return trainer, bare


def _compare_two(config: RunConfig, folder: Path, block: int, pairs: int, *, bare_first: bool) -> tuple[Blocks, Blocks]:
    ranks, run = Ranks(0, 1, torch.device("cpu")), RunFolder(folder)
    task = build_task(config)
    run.prepare(config, task.assets(), task.fingerprint)
    log_to_file(run.log_file)
    loss = _image_loss(config) if "image" in task.train.fetch(np.zeros(1, dtype=np.int64), None) else _series_loss
    batch_size, window = config.train.batch_size, config.data.shuffle_window
    stream = train_batches(
        task.train, seed=config.seed, batch_size=batch_size, start=0, steps=10**6, workers=0, window=window
    )
    between = _Between(block, pairs, warm_up=5)
    if bare_first:
        between.bare = BareLoop(config, stream, loss)
    tracker = Tracker(config, run, ranks, task.plotted)
    with (
        Watchdog(ranks, config.parallel.start_timeout, config.parallel.step_timeout, run.hangs) as watch,
        closing(stream),  # type: ignore[type-var]
        closing(tracker),
        closing(Trainer(config, task, run, ranks, tracker, watch, micro_batches(config, 1))) as trainer,
    ):
        if not bare_first:
            between.bare = BareLoop(config, stream, loss)
        trainer.profiler = between  # type: ignore[assignment]
        with suppress(_Enough):
            trainer.fit()
    return between.trainer, between.bare_ones


def _image_loss(config: RunConfig) -> Callable[[nn.Module, Batch], Tensor]:
    smoothing: float = config.task.label_smoothing  # type: ignore[attr-defined]
    return lambda model, batch: F.cross_entropy(model(batch["image"]), batch["label"], label_smoothing=smoothing)


def _series_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["past"]), batch["future"])


def write_series(path: Path) -> None:
    """Write a table of seven hourly series with 4,000 rows."""
    hours = np.arange(4000)
    noise = np.random.default_rng(0).normal(scale=0.2, size=(len(hours), 7))
    values = np.sin(2 * np.pi * (hours[:, None] / 24 + np.arange(7) / 7)) + noise
    stamps = np.datetime64("2020-01-01T00") + hours.astype("timedelta64[h]")
    rows = [",".join([str(t), *(f"{v:.4f}" for v in row)]) for t, row in zip(stamps, values, strict=True)]
    path.write_text("date," + ",".join("abcdefg") + "\n" + "\n".join(rows) + "\n")


def configuration(kind: str, folder: Path, log_every: int, tiny: bool) -> RunConfig:
    """Return the configuration of a run that is long enough for all blocks, without evaluations and checkpoints."""
    never = ["eval.every_steps=1000000", "checkpoint.every_minutes=100000", "train.max_steps=100000"]
    common = [*never, "train.epochs=1000000", f"train.log_every={log_every}", "device=cpu", "data.workers=0"]
    if kind == "vim2":
        model = ["model.name=vim2_nano", "data=synthetic", "data.image_size=32"]
        model += ["train.ema_decay=null", f"train.batch_size={2 if tiny else 16}"]
        return load_config("vim2_digits", [*common, *model])
    write_series(folder / "series.csv")
    series = [f"data.path={folder / 'series.csv'}", "data.split=ratio", f"train.batch_size={2 if tiny else 24}"]
    return load_config("tsm2_etth1", [*common, *series])


def measure(folder: Path, *, pairs: int, tiny: bool) -> Iterator[Figure]:
    """Yield the ratios for ViM2 and TSM2, each with the default ``log_every`` and with a line of metrics every step."""
    for kind in ("vim2", "tsm2"):
        for log_every in (20, 1):
            here = folder / f"{kind}_{log_every}"
            here.mkdir(parents=True)
            block = 2 if tiny else 20 if log_every == 20 else 5
            config = configuration(kind, here, log_every, tiny)
            models = 1 if tiny else 5
            trainer, bare = compare(config, here / "run", block, pairs if log_every == 20 else 2 * pairs, models)
            step = median_of(bare.wall)["value"]
            name = f"{config.model.name}, a line of metrics every {log_every} steps: trainer / bare loop"
            count = f"median of {len(bare.wall)} pairs of blocks of {block} steps, {models} pairs of models"
            yield Figure(
                "overhead",
                name,
                **median_of(_ratios(trainer.wall, bare.wall)),
                unit="x",
                target=1.03,
                how=f"{count}, {step * 1e3:.0f} ms a bare step on {torch.get_num_threads()} threads",
                detail={"trainer": vars(trainer), "bare": vars(bare)},
            )
            how = f"{count}: user and system time of the process, which other processes disturb less"
            yield Figure(
                "overhead", f"{name}, CPU time", **median_of(_ratios(trainer.cpu, bare.cpu)), unit="x", how=how
            )


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]
