"""What every tracker can do."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger("mmtrain")


class Outlet(ABC):
    """Takes the lines and pictures of a run. Rank 0 alone has any."""

    @abstractmethod
    def log(self, line: dict[str, Any]) -> None:
        """Take a line: its ``kind``, its ``step``, and values."""

    def image(self, name: str, path: Path, step: int) -> None:  # noqa: B027 - most have no place for pictures
        """Take the picture in ``path``."""

    def finish(self) -> None:  # noqa: B027 - nothing to close
        """End; also after an error."""


class Dispensable(Outlet):
    """An outlet whose failure is said once, with a cure: the training goes on without it."""

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
