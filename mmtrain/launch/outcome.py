"""What the tasks of a Slurm job leave in the run folder for the decision whether the job comes back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Place:
    """One start of a Slurm job: its id, and how often it had been started before."""

    job: str
    restart: int

    @classmethod
    def here(cls) -> Place:
        return cls(os.environ.get("SLURM_JOB_ID", "0"), int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    def failures(self, run: Path) -> Path:
        """The folder with a file for each rank that raised an error."""
        return run / "failures" / f"{self.job}_{self.restart}"

    def reports(self, run: Path) -> list[dict[str, Any]]:
        """What the ranks that raised an error left, the causes before those that only lost their connection."""
        found = []
        for path in sorted(self.failures(run).glob("rank_*.json")):
            try:
                found.append({**json.loads(path.read_text()), "at": path.stat().st_mtime})
            except ValueError:  # cut off by a kill
                continue
        return sorted(found, key=lambda report: (report["follows"], report["at"]))

    def _note(self, run: Path) -> Path:
        return run / f".left_{self.job}_{self.restart}"

    def leave_note(self, run: Path, signal: str) -> None:
        """Say that all ranks have left in good order, with a checkpoint, because of ``signal``."""
        self._note(run).write_text(signal)

    def take_note(self, run: Path) -> str | None:
        """The signal of :meth:`leave_note`, which is forgotten then; None where there was no such note."""
        try:
            signal = self._note(run).read_text()
        except FileNotFoundError:
            return None
        self._note(run).unlink(missing_ok=True)
        return signal


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint folder, 0 without one."""
    steps = [path.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)
