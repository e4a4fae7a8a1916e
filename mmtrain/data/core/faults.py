"""Samples that cannot be used: what is left out is counted, written down, and limited."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError

logger = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Fault:
    """Sample ``index`` of a source (-1: a whole shard, which held about ``samples``) cannot be used."""

    index: int
    where: str
    reason: str
    samples: int = 1


class FaultLog:
    """The faults of one split: each once, in a line of this rank's ``file``, and limited over all ranks.

    Args:
        file: JSON lines. What is in it and in its neighbours already, of other ranks and of the job before, counts.
        split: its name, for the lines.
        total: samples of the split that are there.
        most: the largest part of the split that may be missing.
    """

    def __init__(self, file: Path, split: str, total: int, most: float) -> None:
        self.file, self.split, self.total, self.most = file, split, total, most
        self._mine = set(_read(file, split))

    def add(self, fault: Fault) -> None:
        """Note a fault. Raises UserError when they become too many."""
        if (fault.index, fault.where) in self._mine:
            return
        self._mine.add((fault.index, fault.where))
        logger.warning("%s: %s; left out (data.faults=skip)", fault.where, fault.reason)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"split": self.split, **asdict(fault)})
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"{'' if self._ends() else chr(10)}{line}\n")
        missing, total = self.missing()
        if missing > self.most * total:
            raise UserError(
                f"{missing} of {total} samples of the {self.split} split cannot be used, the last one: "
                f"{fault.where}: {fault.reason}. That is more than data.max_faults={self.most:g} of them: repair the "
                f"data (all are listed in {self.file.parent}), or raise data.max_faults"
            )

    def missing(self) -> tuple[int, int]:
        """Samples that cannot be used, of all that there should be, as far as any rank has seen."""
        seen: dict[tuple[int, str], int] = {}
        for file in self.file.parent.glob(f"{self.file.stem.rpartition('_')[0]}_*{self.file.suffix}"):
            seen |= _read(file, self.split)
        lost = sum(samples for (index, _), samples in seen.items() if index < 0)
        return sum(seen.values()), self.total + lost

    def _ends(self) -> bool:
        """Whether the last line is whole: a kill may have cut it off."""
        content = self.file.read_bytes() if self.file.is_file() else b""
        return not content or content.endswith(b"\n")


def _read(file: Path, split: str) -> dict[tuple[int, str], int]:
    """Samples that each fault in ``file`` stands for, as far as its lines can be read."""
    found = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            entry: dict[str, Any] = json.loads(line)
            if entry["split"] == split:
                found[int(entry["index"]), str(entry["where"])] = int(entry["samples"])
        except (ValueError, TypeError, KeyError):
            continue  # cut off by a kill
    return found
