"""Destinations of metrics and plots: always JSON lines, optionally W&B and TensorBoard.

``metrics.jsonl`` in the run folder is always complete. If W&B or TensorBoard fails, the error is logged once and the
run continues without it.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtrain.config import RunConfig
from mmtrain.data.images.formats import open_image
from mmtrain.errors import SharedError
from mmtrain.files import write_atomically
from mmtrain.log import logger
from mmtrain.runs import slurm
from mmtrain.runs.folder import RunFolder
from mmtrain.runs.journal import read_lines

#: Maximum seconds that a run waits for the W&B server: at the start, and for uploading the remaining data at the end.
#: The end is shorter, since a preempted job has little time. Data not uploaded stays in the run folder.
_WANDB_START_SECONDS, _WANDB_END_SECONDS = 60.0, 30.0
#: Seconds between two flushes of TensorBoard's file. A killed run loses at most this much.
_FLUSH_SECONDS = 10
#: The kinds of lines that TensorBoard shows as curves.
_CURVES = ("train", "eval")


def check_installed(config: RunConfig) -> None:
    """Check that the packages that ``config.tracking`` needs are installed.

    Raises:
        SharedError: if one is missing, with the command that installs it. Raised on every rank.
    """
    needed = {"wandb": config.tracking.wandb != "disabled", "tensorboard": config.tracking.tensorboard}
    for name, on in needed.items():
        if on and importlib.util.find_spec(name) is None:
            off = f"tracking.{name}={'disabled' if name == 'wandb' else 'false'}"
            raise SharedError(
                f"tracking.{name} is on, but {name} is not installed. Run pip install 'mmtrain[{name}]', or set {off}"
            )


class MetricSink(ABC):
    """Interface of a destination of metrics and plots. Only rank 0 has sinks."""

    @abstractmethod
    def log(self, line: dict[str, Any]) -> None:
        """Log a line of metrics: ``kind``, ``step``, and values by name."""

    def image(self, name: str, path: Path, step: int) -> None:  # noqa: B027 - most sinks do not log images
        """Log the image file ``path`` under ``name``."""

    def finish(self) -> None:  # noqa: B027 - some sinks have nothing to close
        """Close the sink. Also called after an error."""


class BestEffortSink(MetricSink):
    """A sink whose first failure is logged, with a cure. Training then continues without the sink."""

    #: Name of the sink in the message.
    title: str
    #: Advice at the end of the message.
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
        except Exception as error:  # no failure of a sink may end the training
            self.failed = True
            logger.error(
                "%s failed (%s: %s). The run continues without it; metrics.jsonl is complete. %s",
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
    """Return the numbers of a line as ``<split>/<name>``, or ``<kind>/<name>`` for lines without a split."""
    prefix = line.get("split", line["kind"])
    numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "time")}
    return {f"{prefix}/{name}": number for name, number in numbers.items()}


class JsonLines(MetricSink):
    """Appends each line, with the time, to ``metrics.jsonl``. An error, such as a full disk, ends the run."""

    def __init__(self, run: RunFolder) -> None:
        self.file = run.metrics_file

    def log(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({**line, "time": time.time()}) + "\n")

    def drop_after(self, step: int) -> None:
        """Delete the lines of steps after ``step``. These steps are taken again, with the same results."""
        found = read_lines(self.file)
        if warning := found.warning(self.file):
            logger.warning("%s", warning)
        kept = [line for line in found.lines if line.get("step", 0) <= step]
        write_atomically(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def restarts(self) -> int:
        """Return the number of restarts: the larger of Slurm's count and the number of "resume" lines.

        Slurm counts from 0 for every submitted job. The lines do not contain restarts before the first checkpoint.
        """
        resumed = sum(line["kind"] == "resume" for line in read_lines(self.file).lines)
        return max(slurm.restart_count(), resumed)


class TensorBoard(BestEffortSink):
    """Writes TensorBoard event files to ``folder``, continuing after ``step`` if the folder exists."""

    title = "TensorBoard"
    cure = "To turn it off, set tracking.tensorboard=false"

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self.folder = folder
        self._writer: Any = None
        self._try(lambda: self._open(step if folder.is_dir() else None))

    def _open(self, after: int | None) -> None:
        """Begin an event file. TensorBoard then hides events of steps after ``after`` in older files."""
        from torch.utils.tensorboard import SummaryWriter

        # A run killed before its first checkpoint starts again at step 0, so all its events are hidden.
        purge = None if after is None else after + 1 if after else 0
        self._writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=_FLUSH_SECONDS)

    def _log(self, line: dict[str, Any]) -> None:
        if line["kind"] == "rollback":  # the later steps are taken again
            self._writer.close()
            self._open(line["step"])
        if line["kind"] in _CURVES:
            for name, value in values(line).items():
                self._writer.add_scalar(name, value, line["step"])

    def _image(self, name: str, path: Path, step: int) -> None:
        import numpy as np

        with open_image(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def _finish(self) -> None:
        self._writer.close()


class WandbRun(BestEffortSink):
    """One W&B run for all restarts of a run folder.

    ``wandb_id.txt`` stores its id from the first start on, so that a run killed before its first checkpoint keeps it.
    Every checkpoint stores it too (``known_id``), in case the file is lost.
    """

    title = "W&B"
    cure = "Try tracking.wandb=offline, or set WANDB_API_KEY"

    def __init__(self, config: RunConfig, run: RunFolder, known_id: str | None, restart: int) -> None:
        super().__init__()
        self.config, self.folder, self.restart = config, run.path, restart
        file = run.wandb_id_file
        self.run_id = file.read_text().strip() if file.is_file() else ""
        if not self.run_id:
            self.run_id = known_id or secrets.token_hex(4)
            write_atomically(file, self.run_id + "\n")
        self._run: Any = None
        self._try(self._start)

    def _start(self) -> None:
        import wandb

        mode: Any = self.config.tracking.wandb
        if mode == "online" and not has_wandb_key():
            mode = "offline"
            logger.warning(
                "tracking.wandb=online, but there is no W&B key. The run is recorded in %s. To upload it later, set"
                " WANDB_API_KEY or call `wandb login`, then `mmtrain runs sync %s`",
                self.folder / "wandb",
                self.folder,
            )
        # This file shows that the server has accepted the run. Only then must the server know it.
        known = self.folder / "wandb" / f"online-{self.run_id}"
        self._run = wandb.init(
            project=self.config.tracking.project,
            name=self.config.name,
            id=self.run_id,
            group=self.config.tracking.group or self.config.name,
            job_type=f"restart {self.restart}",
            # "must": if the run was deleted on the server, do not create one with the same name and no history
            resume="must" if mode == "online" and known.exists() else "allow",
            mode=mode,
            dir=str(self.folder),
            config=self.config.model_dump(),
            settings=wandb.Settings(
                silent=True,
                init_timeout=_WANDB_START_SECONDS,
                finish_timeout=_WANDB_END_SECONDS,
                # W&B's diff of the checkout could contain secrets, which code.diff of the run folder omits
                disable_code=True,
            ),
        )
        if mode == "online":
            known.touch()
        # W&B cannot delete rows, so steps that are taken again are logged twice, at the same step with the same loss.
        self._run.define_metric("*", step_metric="step")
        for path in (self.folder / "code.json", self.folder / "code.diff"):
            if path.is_file():  # W&B would link a file outside its folder, with a warning
                copy = shutil.copy(path, self._run.dir)
                self._run.save(copy, base_path=self._run.dir, policy="now", glob=False)

    def _log(self, line: dict[str, Any]) -> None:
        self._run.log({"step": line["step"], **values(line)})

    def _image(self, name: str, path: Path, step: int) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Image(str(path))})

    def _finish(self) -> None:
        self._run.finish()


def has_wandb_key() -> bool:
    """Return whether W&B finds a key in the environment, the netrc file or its settings. Without one it prompts."""
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="mmtrain", prompt=False, update_session=False) is not None


def open_sinks(
    config: RunConfig, run: RunFolder, lines: JsonLines, step: int, known_id: str | None
) -> list[MetricSink]:
    """Open the sinks that ``config.tracking`` enables, ``lines`` first. Only rank 0 calls it.

    Args:
        step: step at which the run starts or resumes. Later steps in the sinks are taken again.
        known_id: W&B run id from the checkpoint, or None.
    """
    sinks: list[MetricSink] = [lines]
    if config.tracking.wandb != "disabled":
        sinks.append(WandbRun(config, run, known_id, restart=lines.restarts()))
    if config.tracking.tensorboard:
        sinks.append(TensorBoard(run.path / "tensorboard", step))
    return sinks
