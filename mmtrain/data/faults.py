"""Samples that cannot be used: what is left out is counted, written down, and limited."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """The faults of one split, seen by this rank: each once, in a line of ``file``, and limited.

    Args:
        file: JSON lines; what is there already (of the job before) counts, and so does what other ranks have written
            beside it: the limit is one for the run, whatever the number of ranks.
        split: its name, for the lines.
        total: samples of the split.
        most: the largest part of them that may be missing.
    """

    def __init__(self, file: Path, split: str, total: int, most: float) -> None:
        self.file, self.split, self.total, self.most = file, split, total, most
        self._seen = self._read(file)

    @property
    def count(self) -> int:
        """Samples that are missing, to all ranks."""
        others = [self._read(file) for file in self.file.parent.glob("*.jsonl") if file != self.file]
        return sum({key: samples for seen in (*others, self._seen) for key, samples in seen.items()}.values())

    def add(self, fault: Fault) -> None:
        """Note a fault. Raises UserError when they become too many."""
        if (fault.index, fault.where) in self._seen:
            return
        self._seen[fault.index, fault.where] = fault.samples
        logger.warning("%s: %s; left out (data.faults=skip)", fault.where, fault.reason)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"split": self.split, **asdict(fault)})
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"{'' if self._ends() else chr(10)}{line}\n")
        if (count := self.count) > self.most * self.total:
            raise UserError(
                f"{count} of {self.total} samples of the {self.split} split cannot be used, the last one: "
                f"{fault.where}: {fault.reason}. That is more than data.max_faults={self.most:g} of them: repair the "
                f"data (all are listed in {self.file.parent}), or raise data.max_faults"
            )

    def _ends(self) -> bool:
        """Whether the last line is whole: a kill may have cut it off."""
        content = self.file.read_bytes() if self.file.is_file() else b""
        return not content or content.endswith(b"\n")

    def _read(self, file: Path) -> dict[tuple[int, str], int]:
        """Samples that are missing by fault, as far as the lines of ``file`` can be read."""
        found = {}
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
            try:
                entry = json.loads(line)
                if entry["split"] == self.split:
                    found[int(entry["index"]), str(entry["where"])] = int(entry["samples"])
            except (ValueError, TypeError, KeyError):
                continue  # cut off by a kill
        return found
