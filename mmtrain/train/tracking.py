"""What a run tells: live progress, ``metrics.jsonl``, curves, and W&B when asked. Rank 0 only."""

from __future__ import annotations

import json
import logging
import math
import os
import time
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
from mmtrain.train.wandb_run import WandbRun

logger = logging.getLogger("mmtrain")

#: Redraw the curves at most this often, in seconds, while the run goes on.
_CURVES_EVERY = 30.0


class Tracker:
    """Counts and writes down."""

    def __init__(self, config: RunConfig, run: RunFolder, ranks: Ranks, plotted: tuple[str, ...]) -> None:
        self.config, self.run, self.ranks, self.plotted = config, run, ranks, plotted
        self.progress: Progress | None = None
        self.wandb: WandbRun | None = None
        self._losses: list[float] = []
        self._curves_at = 0.0
        self._ready: float | None = None
        self._started = False

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
            _drop_after(self.run, after.step)
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
