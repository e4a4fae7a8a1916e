"""The header: each run in a line."""

from __future__ import annotations

from collections.abc import Sequence

from mmtrain.report.html import Markup, dot, element, joined, table
from mmtrain.report.model import Shown
from mmtrain.runs.table import COLUMNS

_MOODS = {
    "good": ("finished", "running"),
    "bad": ("failed", "lost", "stalled"),
    "doubtful": ("preempted", "requeued", "stopped", "timeout"),
}


def section(runs: Sequence[Shown]) -> Markup:
    """State, progress and results of the runs, as `mmtrain runs` shows them, with colours as in the curves."""
    columns = [name for name in COLUMNS if name != "run"]
    rows = []
    for run in runs:
        cells: list[object] = [joined([dot(run.color), run.name])]
        for name in columns:
            text = COLUMNS[name](run.status)
            cells.append(_state(text) if name == "state" else text)
        rows.append(cells)
    folders = table(["run", "folder"], [(run.name, run.facts.path.resolve()) for run in runs])
    return joined([table(["run", *columns], rows), element("details", element("summary", "folders"), folders)])


def _state(text: str) -> Markup:
    mood = next((name for name, states in _MOODS.items() if text in states), "")
    return element("span", text, class_=f"state {mood}".strip())
