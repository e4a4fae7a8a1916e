"""What every tracker can do.

``metrics.jsonl`` of a run folder: the lines that everything else is drawn from.

TensorBoard event files, when asked for: ``tensorboard --logdir RUN``.
"""

from __future__ import annotations

import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtrain.files import read_json_lines
from mmtrain.runs.folder import RunFolder

logger = logging.getLogger("mmtrain")


class MetricSink(ABC):
    """Takes the lines and pictures of a run. Rank 0 alone has any."""

    @abstractmethod
    def log(self, line: dict[str, Any]) -> None:
        """Take a line: its ``kind``, its ``step``, and values."""

    def image(self, name: str, path: Path, step: int) -> None:  # noqa: B027 - most have no place for pictures
        """Take the picture in ``path``."""

    def finish(self) -> None:  # noqa: B027 - nothing to close
        """End; also after an error."""


class BestEffortSink(MetricSink):
    """A sink whose failure is said once, with a cure: the training goes on without it."""

    #: What it is called in the message, and what may help.
    title: str
    cure: str

    def __init__(self) -> None:
        self.failed = False

    def log(self, line: dict[str, Any]) -> None:
        self._try(lambda: self._log(line))

    def image(self, name: str, path: Path, step: int) -> None:
        self._try(lambda: self._image(name, path, step))

    def finish(self) -> None:
        self._try(self._finish)

    def _try(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # any failure of a tracker must leave the training alone
            self.failed = True
            logger.error(
                "%s failed (%s: %s): this run goes on without it, its metrics.jsonl is complete. %s",
                self.title,
                type(error).__name__,
                error,
                self.cure,
            )

    @abstractmethod
    def _log(self, line: dict[str, Any]) -> None: ...

    @abstractmethod
    def _image(self, name: str, path: Path, step: int) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


def values(line: dict[str, Any]) -> dict[str, int | float]:
    """The numbers of a line, each named by the split, or the kind of line, that it is of."""
    prefix = line.get("split", line["kind"])
    numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "time")}
    return {f"{prefix}/{name}": number for name, number in numbers.items()}


class JsonLines(MetricSink):
    """Appends each line, with the time. A full disk is not passed over here: it ends the run."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def log(self, line: dict[str, Any]) -> None:
        with self.run.metrics_file.open("a") as file:
            file.write(json.dumps({**line, "time": time.time()}) + "\n")

    def drop_after(self, step: int) -> None:
        """Leave out what was noted after ``step``: those steps are taken again, and come out the same."""
        kept = [line for line in read_metrics(self.run) if line.get("step", 0) <= step]
        partial = self.run.metrics_file.with_name(f".{self.run.metrics_file.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.run.metrics_file)

    def restarts(self) -> int:
        """How often the run was started again: Slurm's count, or that of the resumptions here where it is higher.

        Slurm's starts from 0 for a job that is submitted anew; the lines miss what ended before its first checkpoint.
        """
        resumed = sum(line["kind"] == "resume" for line in read_metrics(self.run))
        return max(int(os.environ.get("SLURM_RESTART_COUNT") or 0), resumed)


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
    return read_json_lines(run.metrics_file)


#: What is written is on the disk so many seconds later at most: a killed run should not lose minutes.
_FLUSH_SECONDS = 10

#: The kinds of lines that are curves.
_CURVES = ("train", "eval")


class TensorBoard(BestEffortSink):
    """Writes to ``folder``, after what earlier processes of the run wrote up to ``step``."""

    title = "TensorBoard"
    cure = "tracking.tensorboard=false turns it off"

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self.folder = folder
        self._writer: Any = None
        self._try(lambda: self._open(step if folder.is_dir() else None))

    def _open(self, after: int | None) -> None:
        """Begin an event file. TensorBoard hides the events of steps past ``after`` that older files hold."""
        from torch.utils.tensorboard import SummaryWriter

        # a run that was killed before its first checkpoint starts over, from whatever was counted as step 0
        purge = None if after is None else after + 1 if after else 0
        self._writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=_FLUSH_SECONDS)

    def _log(self, line: dict[str, Any]) -> None:
        if line["kind"] == "rollback":  # the steps since then are taken again
            self._writer.close()
            self._open(line["step"])
        if line["kind"] in _CURVES:
            for name, value in values(line).items():
                self._writer.add_scalar(name, value, line["step"])

    def _image(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def _finish(self) -> None:
        self._writer.close()
