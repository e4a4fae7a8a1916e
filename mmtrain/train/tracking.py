"""What a run tells: live progress, ``metrics.jsonl``, curves, and W&B when asked. Rank 0 only."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmtrain.config import RunConfig
from mmtrain.parallel.ranks import Ranks
from mmtrain.train.progress import Progress
from mmtrain.train.run_folder import RunFolder
from mmtrain.train.state import Schedule, TrainState
from mmtrain.train.wandb_run import WandbRun

logger = logging.getLogger("mmtrain")
T = TypeVar("T")

#: Redraw the curves at most this often, in seconds, while the run goes on.
_CURVES_EVERY = 30.0


class Tracker:
    """Counts, times and writes down. Losses stay tensors until a line is written, so no step waits for one."""

    def __init__(self, config: RunConfig, run: RunFolder, ranks: Ranks, plotted: tuple[str, ...]) -> None:
        self.config, self.run, self.ranks, self.plotted = config, run, ranks, plotted
        self.progress: Progress | None = None
        self.wandb: WandbRun | None = None
        self._losses: list[Tensor] = []
        self._data_seconds = 0.0
        self._window_start = time.perf_counter()
        self._curves_at = 0.0

    @property
    def run_id(self) -> str | None:
        """The W&B run id, which is saved with every checkpoint so that a resumed run stays one curve."""
        return self.wandb.run_id if self.wandb else None

    def start(self, state: TrainState, schedule: Schedule) -> None:
        self._schedule = schedule
        if not self.ranks.main:
            return
        if self.config.tracking.wandb != "disabled":
            self.wandb = WandbRun(self.config, self.run.path, state.tracker_id)
        if state.step:
            logger.info("resuming at step %d of %d", state.step, schedule.steps)
            _drop_after(self.run, state.step)
            self._write({"kind": "resume", "step": state.step})
        self.progress = Progress(schedule.steps, state.step)
        self._window_start = time.perf_counter()

    def waiting(self, get: Callable[[], T]) -> T:
        """Run ``get`` and count its time as waiting for data."""
        begin = time.perf_counter()
        found = get()
        self._data_seconds += time.perf_counter() - begin
        return found

    def after_step(self, state: TrainState, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Note a step; every ``train.log_every`` steps, and at the last, write a line."""
        self._losses.append(loss)
        due = state.step % self.config.train.log_every == 0 or state.step == self._schedule.steps
        if not due:
            if self.progress:
                self.progress.advance(state.step)
            return
        mean = self.ranks.sum(torch.stack(self._losses).mean()) / self.ranks.world
        seconds = time.perf_counter() - self._window_start
        speed = len(self._losses) * self.config.train.batch_size / seconds
        line: dict[str, Any] = {
            "kind": "train",
            "step": state.step,
            "samples": state.samples,
            "epoch": state.step / self._schedule.steps_per_epoch,
            "loss": mean.item(),
            "lr": rate,
            "grad_norm": norm.item(),
            "samples_per_second": speed,
            "data_share": self._data_seconds / seconds,
        }
        self._losses, self._data_seconds = [], 0.0
        if self.progress:
            self._write(line)
            self.progress.advance(state.step, loss=line["loss"], lr=rate, speed=speed)
        self._window_start = time.perf_counter()

    def after_evaluation(self, state: TrainState, split: str, results: dict[str, float], best: bool = False) -> None:
        if self.progress:
            epoch = state.step / self._schedule.steps_per_epoch
            self._write({"kind": "eval", "split": split, "step": state.step, "epoch": epoch, **results})
            shown = "  ".join(f"{name} {results[name]:.4g}" for name in self.plotted)
            self.progress.say(f"{split} at step {state.step}: {shown}{'  (best)' if best else ''}")
            if time.monotonic() - self._curves_at > _CURVES_EVERY:
                self._draw()
        # the evaluation is not part of the training speed
        self._window_start = time.perf_counter()
        self._data_seconds = 0.0

    def warn(self, message: str) -> None:
        if self.progress:
            self.progress.say(f"warning: {message}")
            logger.debug(message)

    def finish(self, state: TrainState, test: dict[str, float] | None, tested_step: int) -> None:
        if not self.progress:
            return
        if test is not None:
            self._write({"kind": "eval", "split": "test", "step": tested_step, **test})
        self._draw()

    def close(self) -> None:
        """End the display and the W&B run; also after an error."""
        if self.progress:
            self.progress.close()
        if self.wandb:
            self.wandb.finish()

    def _draw(self) -> None:
        if self.config.tracking.plots:
            from mmtrain.plots import draw_curves

            draw_curves(self.run.curves_file, read_metrics(self.run), self.plotted)
            self._curves_at = time.monotonic()

    def _write(self, line: dict[str, Any]) -> None:
        with self.run.metrics_file.open("a") as file:
            file.write(json.dumps({**line, "time": time.time()}) + "\n")
        if self.wandb:
            self.wandb.log(line)


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
    lines = []
    if run.metrics_file.is_file():
        for text in run.metrics_file.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def _drop_after(run: RunFolder, step: int) -> None:
    """Leave out what was noted after ``step``: those steps are taken again, and come out the same."""
    kept = [line for line in read_metrics(run) if line.get("step", 0) <= step]
    partial = run.metrics_file.with_name(f".{run.metrics_file.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(partial, run.metrics_file)
