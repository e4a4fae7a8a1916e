"""The jobs of the runs, from their journals, and the faults in their data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mmtrain.report.html import Markup, dot, folded, joined, table
from mmtrain.report.model import Shown
from mmtrain.runs.reader import Line
from mmtrain.runs.status import number

#: Written when a rank of a Slurm job has raised an error.
_FAILURE = "failure.txt"
#: So many lines of a file of faults are shown.
_MOST = 200


def section(runs: Sequence[Shown]) -> Markup:
    """A line a job or event of the journals, in the order in which they were written."""
    rows = []
    for run in runs:
        for line in run.facts.journal:
            job = line.get("job") or (f"process {line['pid']}" if line.get("pid") else "-")
            rows.append([joined([dot(run.color), run.name]), _when(line), line["kind"], job, _details(line)])
    parts = [table(["run", "time", "event", "job", ""], rows)] if rows else []
    for run in runs:
        lines = _lines(run.facts.path / _FAILURE)
        if lines:
            parts.append(folded(joined([dot(run.color), f"{run.name}: {_FAILURE}"]), "\n".join(lines)))
    return joined(parts)


def _when(line: Line) -> str:
    moment = number(line, "time")
    return "-" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _details(line: Line) -> str:
    found = []
    for key, value in line.items():
        if key in ("kind", "time", "job", "pid") or value is None:
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        found.append(f"{key} {text}")
    return "; ".join(found)


def faults(runs: Sequence[Shown]) -> Markup:
    """What is in the files ``*faults*.jsonl`` of the run folders, where there are any."""
    parts = []
    for run in runs:
        for file in sorted([*run.facts.path.glob("*faults*.jsonl"), *run.facts.path.glob("*/*faults*.jsonl")]):
            texts = _lines(file)
            if texts:
                title = joined([dot(run.color), f"{run.name}: {file.relative_to(run.facts.path)}, {len(texts)} lines"])
                more = [f"… and {len(texts) - _MOST} more"] if len(texts) > _MOST else []
                parts.append(folded(title, "\n".join([*texts[:_MOST], *more])))
    return joined(parts)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []
