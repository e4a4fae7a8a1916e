"""``metrics.jsonl`` of a run folder: the lines that everything else is drawn from."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from mmtrain.lines import read_lines
from mmtrain.train.run_folder import RunFolder
from mmtrain.train.trackers.base import Outlet


class JsonLines(Outlet):
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
    return read_lines(run.metrics_file)
