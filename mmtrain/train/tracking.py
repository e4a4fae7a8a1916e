"""What a run tells: live progress, ``metrics.jsonl``, curves, and W&B and TensorBoard when asked. Rank 0 only."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import RunConfig
from mmtrain.parallel.ranks import Ranks
from mmtrain.tasks import Batch
from mmtrain.train.meter import Meter
from mmtrain.train.process_age import process_age
from mmtrain.train.progress import Progress
from mmtrain.train.run_folder import RunFolder
from mmtrain.train.state import Schedule, TrainState
from mmtrain.train.trackers import JsonLines, Outlet, WandbRun, open_outlets, read_metrics

logger = logging.getLogger("mmtrain")

#: Redraw the curves at most this often, in seconds, while the run goes on.
_CURVES_EVERY = 30.0


class Tracker:
    """Counts and writes down."""

    def __init__(self, config: RunConfig, run: RunFolder, ranks: Ranks, plotted: tuple[str, ...]) -> None:
        self.config, self.run, self.ranks, self.plotted = config, run, ranks, plotted
        self.progress: Progress | None = None
        self.outlets: list[Outlet] = []
        self._lines = JsonLines(run)
        self._losses: list[float] = []
        self._curves_at = 0.0
        self._ready: float | None = None
        self._started = False

    @property
    def run_id(self) -> str | None:
        """The W&B run id, which is saved with every checkpoint so that a resumed run stays one curve."""
        return next((outlet.run_id for outlet in self.outlets if isinstance(outlet, WandbRun)), None)

    def start(self, state: TrainState, schedule: Schedule) -> None:
        self._schedule = schedule
        if not self.ranks.main:
            return
        if self.run.metrics_file.is_file():  # also of a start that was killed before its first checkpoint
            self._lines.drop_after(state.step)
        if state.step:
            logger.info("resuming at step %d of %d", state.step, schedule.steps)
            self._lines.log({"kind": "resume", "step": state.step})
        self.outlets = open_outlets(self.config, self.run, self._lines, state.step, state.tracker_id)
        self.progress = Progress(schedule.steps, state.step)

    def before_step(self) -> None:
        """Note when the first step of this process begins, its batch being there."""
        if not self._started and self._ready is None:
            self._ready = process_age()

    def consumed(self, step: int, batches: list[Batch]) -> None:
        """Note the samples of a step, where ``tracking.samples`` asks for it; of a step taken again the last counts."""
        if not self.config.tracking.samples:
            return
        index = torch.cat([batch["index"] for batch in batches]).tolist()
        self.run.samples.mkdir(exist_ok=True)
        with (self.run.samples / f"rank_{self.ranks.rank:05d}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "samples": index}) + "\n")

    def after_step(self, state: TrainState, loss: float, norm: float, rate: float, meter: Meter) -> None:
        """Note a step; every ``train.log_every`` steps, and at the last, write a line."""
        if not self._started:
            self._note_start(state.step - 1)
        if math.isfinite(loss):  # one of a skipped step would hide the others
            self._losses.append(loss)
        due = state.step % self.config.train.log_every == 0 or state.step == self._schedule.steps
        if not due:
            if self.progress:
                self.progress.advance(state.step)
            return
        line: dict[str, Any] = {
            "kind": "train",
            "step": state.step,
            "samples": state.samples,
            "epoch": state.samples / self._schedule.samples_per_epoch,
            "loss": sum(self._losses) / len(self._losses) if self._losses else math.nan,
            "lr": rate,
            "grad_norm": norm,
            **({"loss_scale": state.loss_scale} if state.loss_scale != 1 else {}),
            **meter.line(),
        }
        self._losses = []
        if self.progress:
            self._write(line)
            self.progress.advance(state.step, loss=line["loss"], lr=rate, speed=line["samples_per_second"])

    def _note_start(self, step: int) -> None:
        """Seconds from the start of the process to the beginning, and to the end, of its first step."""
        self._started, age = True, process_age()
        if self.progress and self._ready is not None and age is not None:
            seconds = {"ready_seconds": round(self._ready, 2), "first_step_seconds": round(age, 2)}
            self._write({"kind": "start", "step": step, **seconds})

    def rolled_back(self, before: TrainState, after: TrainState, loss: float) -> None:
        """Note that the run went back to an earlier step."""
        self._losses = []
        self.warn(
            f"step {before.step}: the loss jumped to {loss:.4g}: back to the checkpoint of step {after.step}, and on"
            f" with other samples ({after.left_out} left out so far)"
        )
        if self.progress:
            self._lines.drop_after(after.step)
            self._write({"kind": "rollback", "step": after.step, "from_step": before.step, "loss": loss})

    def after_evaluation(self, state: TrainState, split: str, results: dict[str, float], best: bool = False) -> None:
        if self.progress:
            epoch = state.step / self._schedule.steps_per_epoch
            self._write({"kind": "eval", "split": split, "step": state.step, "epoch": epoch, **results})
            shown = "  ".join(f"{name} {results[name]:.4g}" for name in self.plotted)
            self.progress.say(f"{split} at step {state.step}: {shown}{'  (best)' if best else ''}")
            if time.monotonic() - self._curves_at > _CURVES_EVERY:
                self._draw()

    def warn(self, message: str) -> None:
        if self.progress:
            self.progress.say(f"warning: {message}")
            logger.debug(message)

    def finish(
        self, state: TrainState, test: dict[str, float] | None, tested_step: int, pictures: Sequence[Path] = ()
    ) -> None:
        """Note the result of the tested checkpoint, and what the task drew with it."""
        if not self.progress:
            return
        if test is not None:
            self._write({"kind": "eval", "split": "test", "step": tested_step, **test})
        self._draw()
        drawn = [(picture, tested_step) for picture in pictures] + [(self.run.curves_file, state.step)]
        for picture, step in drawn:
            if picture.suffix == ".png" and picture.is_file():
                self._show(picture, step)

    def close(self) -> None:
        """End the display and the trackers; also after an error."""
        if self.progress:
            self.progress.close()
        for outlet in self.outlets:
            outlet.finish()

    def _draw(self) -> None:
        if self.config.tracking.plots:
            from mmtrain.plots import draw_curves

            draw_curves(self.run.curves_file, read_metrics(self.run), self.plotted)
            self._curves_at = time.monotonic()

    def _show(self, picture: Path, step: int) -> None:
        for outlet in self.outlets:
            outlet.image(picture.stem, picture, step)

    def _write(self, line: dict[str, Any]) -> None:
        for outlet in self.outlets:
            outlet.log(line)
