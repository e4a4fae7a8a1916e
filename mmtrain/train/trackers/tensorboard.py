"""TensorBoard event files, when asked for: ``tensorboard --logdir RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtrain.train.trackers.base import Dispensable, values

#: What is written is on the disk so many seconds later at most: a killed run should not lose minutes.
_FLUSH_SECONDS = 10

#: The kinds of lines that are curves.
_CURVES = ("train", "eval")


class TensorBoard(Dispensable):
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
