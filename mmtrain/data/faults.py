"""Samples that cannot be used: what is left out is counted, written down, and limited."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError

logger = logging.getLogger("mmtrain")

POLICIES = ("stop", "skip")


@dataclass(frozen=True)
class Fault:
    """Sample ``index`` of a source (-1: a whole shard, which held about ``samples``) cannot be used."""

    index: int
    where: str
    reason: str
    samples: int = 1


class FaultLog:
    """The faults of one split, seen by this rank: each once, in a line of ``file``, and limited.

    Args:
        file: JSON lines; what is there already (of the job before) counts.
        split: its name, for the lines.
        total: samples of the split.
        most: the largest part of them that may be missing.
    """

    def __init__(self, file: Path, split: str, total: int, most: float) -> None:
        self.file, self.split, self.total, self.most = file, split, total, most
        self._seen = {(line["index"], line["where"]): int(line["samples"]) for line in self._lines()}

    @property
    def count(self) -> int:
        """Samples that are missing."""
        return sum(self._seen.values())

    def add(self, fault: Fault) -> None:
        """Note a fault. Raises UserError when they become too many."""
        if (fault.index, fault.where) in self._seen:
            return
        self._seen[fault.index, fault.where] = fault.samples
        logger.warning("%s: %s; left out (data.faults=skip)", fault.where, fault.reason)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"split": self.split, **asdict(fault)}) + "\n")
        if self.count > self.most * self.total:
            raise UserError(
                f"{self.count} of {self.total} samples of the {self.split} split cannot be used, the last one: "
                f"{fault.where}: {fault.reason}. That is more than data.max_faults={self.most:g} of them: repair the "
                f"data (all are listed in {self.file}), or raise data.max_faults"
            )

    def _lines(self) -> list[dict[str, Any]]:
        if not self.file.is_file():
            return []
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if entry.get("split") == self.split:
                found.append(entry)
        return found
