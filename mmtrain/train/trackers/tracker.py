"""Report the progress of training: on the terminal, as lines of metrics, and as plotted curves. Mostly on rank 0."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from mmtrain.config import RunConfig
from mmtrain.log import logger
from mmtrain.parallel.ranks import Ranks
from mmtrain.plotting import try_to_draw
from mmtrain.plotting.runs import draw_curves
from mmtrain.runs.folder import RunFolder
from mmtrain.runs.journal import read_lines
from mmtrain.tasks import Batch
from mmtrain.train.meter import Meter
from mmtrain.train.state import Schedule, TrainState
from mmtrain.train.trackers.sinks import JsonLines, MetricSink, WandbRun, open_sinks

#: Minimum seconds between two progress lines if stderr is not a terminal, and between two plots of the curves.
_PLAIN_EVERY, _CURVES_EVERY = 5.0, 30.0


def process_age() -> float:
    """Return the seconds since this process was started, imports included."""
    started = psutil.Process().create_time()
    if sys.platform != "linux":
        return time.time() - started
    # psutil knows the boot time only to a second. The difference is the start since boot, exact to 10 ms.
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (started - psutil.boot_time())


class Progress:
    """Progress display: a bar on a terminal, otherwise log lines.

    Args:
        total: number of steps of the run.
        done: steps taken before this process started.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.begin, self.begin_step = time.monotonic(), done
        self._logged_at = 0.0
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=total, completed=done, detail="")
            self._bar.start()

    def advance(
        self, step: int, loss: float | None = None, lr: float | None = None, speed: float | None = None
    ) -> None:
        """Show that ``step`` is done. Loss, learning rate and speed (samples/s) are given at metric lines only."""
        detail = f"loss {loss:.4f}  lr {lr:.2e}  {speed:.0f} samples/s" if loss is not None else ""
        if self._bar:
            self._bar.update(self._task, completed=step)
            if detail:
                self._bar.update(self._task, detail=detail)
        elif detail and (time.monotonic() - self._logged_at > _PLAIN_EVERY or step == self.total):
            self._logged_at = time.monotonic()
            logger.info("step %d/%d  %s  eta %s", step, self.total, detail, self._eta(step))

    def _eta(self, step: int) -> str:
        seconds = (time.monotonic() - self.begin) * (self.total - step) / max(step - self.begin_step, 1)
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}:{rest:02d}"

    def show(self, message: str) -> None:
        """Print ``message`` above the bar, or log it."""
        if self._bar:
            self._bar.console.print(message, highlight=False, markup=False)
        logger.log(logging.DEBUG if self._bar else logging.INFO, message)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()


class Tracker:
    """Collects the metrics of a run and logs them. Only rank 0 has :attr:`progress` and :attr:`sinks`.

    ``plotted`` are the names of the metrics that are shown on the terminal and plotted.
    """

    def __init__(self, config: RunConfig, run: RunFolder, ranks: Ranks, plotted: tuple[str, ...]) -> None:
        self.config, self.run, self.ranks, self.plotted = config, run, ranks, plotted
        self.progress: Progress | None = None
        self.sinks: list[MetricSink] = []
        self._lines = JsonLines(run)
        self._losses: list[float] = []
        self._curves_at = 0.0
        self._ready: float | None = None
        self._started = False

    @property
    def run_id(self) -> str | None:
        """The W&B run id, or None. It is saved in every checkpoint, so that a resumed run continues the W&B run."""
        return next((sink.run_id for sink in self.sinks if isinstance(sink, WandbRun)), None)

    def start(self, state: TrainState, schedule: Schedule) -> None:
        """Open the sinks and the display. Drop metrics of steps after ``state.step``, which are taken again."""
        self._schedule = schedule
        if not self.ranks.main:
            return
        if self.run.metrics_file.is_file():  # also if an earlier process was killed before its first checkpoint
            self._lines.drop_after(state.step)
        if state.step:
            logger.info("resuming at step %d of %d", state.step, schedule.steps)
            self._lines.log({"kind": "resume", "step": state.step})
        self.sinks = open_sinks(self.config, self.run, self._lines, state.step, state.tracker_id)
        self.progress = Progress(schedule.steps, state.step)

    def before_step(self) -> None:
        """Record the time at which the first step of this process begins, after its batch was loaded."""
        if not self._started and self._ready is None:
            self._ready = process_age()

    def consumed(self, step: int, batches: list[Batch]) -> None:
        """Write the sample numbers of a step (``tracking.samples``). If a step is repeated, its last line counts."""
        if not self.config.tracking.samples:
            return
        index = torch.cat([batch["index"] for batch in batches]).tolist()
        self.run.samples.mkdir(exist_ok=True)
        with (self.run.samples / f"rank_{self.ranks.rank:05d}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "samples": index}) + "\n")

    def after_step(self, state: TrainState, loss: float, norm: float, rate: float, meter: Meter) -> None:
        """Record a step. Log a line of metrics every ``train.log_every`` steps and after the last one.

        Args:
            loss: mean over ranks, NaN for a skipped step.
            norm: gradient norm before clipping.
            rate: learning rate.
            meter: source of the measured metrics.
        """
        if not self._started:
            self._note_start(state.step - 1)
        if math.isfinite(loss):  # the NaN of a skipped step would hide the other losses
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
        """Log the seconds from the start of the process to the beginning and to the end of its first step."""
        self._started, age = True, process_age()
        if self.progress and self._ready is not None:
            seconds = {"ready_seconds": round(self._ready, 2), "first_step_seconds": round(age, 2)}
            self._write({"kind": "start", "step": step, **seconds})

    def rolled_back(self, before: TrainState, after: TrainState, loss: float) -> None:
        """Log a rollback. Drop metrics of steps that are taken again."""
        self._losses = []
        self.warn(
            f"step {before.step}: the loss jumped to {loss:.4g}. The run returns to the checkpoint of step {after.step}"
            f" and continues with later samples ({after.left_out} samples skipped so far)"
        )
        if self.progress:
            self._lines.drop_after(after.step)
            self._write({"kind": "rollback", "step": after.step, "from_step": before.step, "loss": loss})

    def after_evaluation(self, state: TrainState, results: dict[str, float], best: bool) -> None:
        """Log the metrics of an evaluation on val. ``best``: they are the best so far."""
        if self.progress:
            epoch = state.step / self._schedule.steps_per_epoch
            self._write({"kind": "eval", "split": "val", "step": state.step, "epoch": epoch, **results})
            shown = "  ".join(f"{name} {results[name]:.4g}" for name in self.plotted)
            self.progress.show(f"val at step {state.step}: {shown}{'  (best)' if best else ''}")
            if time.monotonic() - self._curves_at > _CURVES_EVERY:
                self._draw()

    def warn(self, message: str) -> None:
        """Show a warning, on rank 0."""
        if self.progress:
            self.progress.show(f"warning: {message}")
            logger.debug(message)

    def finish(
        self, state: TrainState, test: dict[str, float] | None, tested_step: int, pictures: Sequence[Path] = ()
    ) -> None:
        """Log the test metrics of the tested checkpoint and the plots of the task."""
        if not self.progress:
            return
        if test is not None:
            self._write({"kind": "eval", "split": "test", "step": tested_step, **test})
        self._draw()
        for picture, step in [*((picture, tested_step) for picture in pictures), (self.run.curves_file, state.step)]:
            if picture.suffix == ".png" and picture.is_file():
                for sink in self.sinks:
                    sink.image(picture.stem, picture, step)

    def close(self) -> None:
        """Close the display and the sinks. Also called after an error."""
        if self.progress:
            self.progress.close()
        for sink in self.sinks:
            sink.finish()

    def _draw(self) -> None:
        if self.config.tracking.plots:
            lines, curves = read_lines(self.run.metrics_file).lines, self.run.curves_file
            try_to_draw(curves, lambda: draw_curves(curves, lines, self.plotted))
            self._curves_at = time.monotonic()

    def _write(self, line: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.log(line)
