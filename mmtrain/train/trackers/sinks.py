"""The places that the lines and pictures of a run go to: JSON lines always, W&B and TensorBoard when asked for.

``metrics.jsonl`` of a run folder is complete whatever happens to the others: a failure of W&B or TensorBoard is said
once, and the run goes on without it.
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

#: How long W&B may keep the run waiting for its server, in seconds: at the start, and for the last of its data at the
#: end. The end is the shorter: a job that is preempted has little time. What is left stays in the run folder.
_WANDB_START_SECONDS, _WANDB_END_SECONDS = 60.0, 30.0
#: TensorBoard's lines are on the disk so many seconds later at most: a killed run should not lose minutes.
_FLUSH_SECONDS = 10
#: The kinds of lines that TensorBoard draws as curves.
_CURVES = ("train", "eval")


def check_installed(config: RunConfig) -> None:
    """See that the packages that ``config.tracking`` wants are there, before anything is made or loaded.

    Raises:
        SharedError: with the command that installs what is missing; on every rank alike.
    """
    wanted = {"wandb": config.tracking.wandb != "disabled", "tensorboard": config.tracking.tensorboard}
    for name, on in wanted.items():
        if on and importlib.util.find_spec(name) is None:
            off = f"tracking.{name}={'disabled' if name == 'wandb' else 'false'}"
            raise SharedError(
                f"tracking.{name} is on, but {name} is not installed: pip install 'mmtrain[{name}]', or {off}"
            )


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
    """Appends each line, with the time, to ``metrics.jsonl``. An error such as a full disk ends the run."""

    def __init__(self, run: RunFolder) -> None:
        self.file = run.metrics_file

    def log(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({**line, "time": time.time()}) + "\n")

    def drop_after(self, step: int) -> None:
        """Leave out what was noted after ``step``: those steps are taken again, and come out the same."""
        found = read_lines(self.file)
        if warning := found.warning(self.file):
            logger.warning("%s", warning)
        kept = [line for line in found.lines if line.get("step", 0) <= step]
        write_atomically(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def restarts(self) -> int:
        """How often the run was started again: Slurm's count, or that of the resumptions here where it is higher.

        Slurm's starts from 0 for a job that is submitted anew; the lines miss what ended before its first checkpoint.
        """
        resumed = sum(line["kind"] == "resume" for line in read_lines(self.file).lines)
        return max(slurm.restart_count(), resumed)


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

        with open_image(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def _finish(self) -> None:
        self._writer.close()


class WandbRun(BestEffortSink):
    """One W&B run over all restarts of a run folder.

    Its id is in ``wandb_id.txt`` from the first start on, so that a run killed before its first checkpoint keeps it,
    and in every checkpoint (``known_id``), so that it outlives the loss of the file.
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
                "tracking.wandb=online, but there is no W&B key: this run is recorded in %s. Set WANDB_API_KEY or call"
                " `wandb login`; `mmtrain runs sync %s` uploads it",
                self.folder / "wandb",
                self.folder,
            )
        # left behind where the server took the run on: only then must it know the run
        known = self.folder / "wandb" / f"online-{self.run_id}"
        self._run = wandb.init(
            project=self.config.tracking.project,
            name=self.config.name,
            id=self.run_id,
            group=self.config.tracking.group or self.config.name,
            job_type=f"restart {self.restart}",
            # "must": a run that is gone from the server is not started anew under the same name, without its past
            resume="must" if mode == "online" and known.exists() else "allow",
            mode=mode,
            dir=str(self.folder),
            config=self.config.model_dump(),
            settings=wandb.Settings(
                silent=True,
                init_timeout=_WANDB_START_SECONDS,
                finish_timeout=_WANDB_END_SECONDS,
                # its own diff of the checkout would hold secrets: code.diff of the run folder leaves them out
                disable_code=True,
            ),
        )
        if mode == "online":
            known.touch()
        # steps that are taken again after a restart are logged again, since W&B appends rows and takes none back: they
        # fall on the same place of this axis, with the same loss
        self._run.define_metric("*", step_metric="step")
        for path in (self.folder / "code.json", self.folder / "code.diff"):
            if path.is_file():  # a copy: of a file elsewhere W&B makes a link, with a warning
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
    """Whether W&B finds a key by itself: in the environment, the netrc file, or its settings. It would ask, else."""
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="mmtrain", prompt=False, update_session=False) is not None


def open_sinks(
    config: RunConfig, run: RunFolder, lines: JsonLines, step: int, known_id: str | None
) -> list[MetricSink]:
    """All that ``config.tracking`` asks for, ``lines`` first; rank 0 calls it.

    Args:
        step: the last step that counts: what was written of later ones is taken again.
        known_id: the W&B run id in the checkpoint that the run goes on from.
    """
    sinks: list[MetricSink] = [lines]
    if config.tracking.wandb != "disabled":
        sinks.append(WandbRun(config, run, known_id, restart=lines.restarts()))
    if config.tracking.tensorboard:
        sinks.append(TensorBoard(run.path / "tensorboard", step))
    return sinks
