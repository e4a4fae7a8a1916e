"""Format the table of runs for the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from mmtrain.runs.status import Status

#: The columns in order, each with the function that returns its text.
COLUMNS: dict[str, Callable[[Status], str]] = {
    "run": lambda s: str(s.path),
    "model": lambda s: s.model,
    "state": lambda s: s.state,
    "step": lambda s: f"{s.step}/{s.total}" if s.total else str(s.step),
    "loss": lambda s: figure(s.loss),
    "samples/s": lambda s: figure(s.speed),
    "ETA": lambda s: "-" if s.eta is None else span(s.eta),
    "nodes": lambda s: s.nodes or "-",
    "restarts": lambda s: str(s.restarts),
    "best val": lambda s: "-" if s.best is None else f"{s.metric} {figure(s.best)}",
    "test": lambda s: "-" if s.test is None else f"{s.metric} {figure(s.test)}",
    "last written": lambda s: f"{span(max(time.time() - s.written, 0))} ago",
}
#: Columns that are omitted in a narrow terminal, in this order.
_DISPENSABLE = ("nodes", "restarts", "samples/s", "loss", "test", "model", "last written")
_COLORS = {
    "running": "green",
    "finished": "green",
    "stalled": "red",
    "failed": "red",
    "lost": "red",
    "stopped": "yellow",
    "preempted": "yellow",
    "requeued": "yellow",
    "timeout": "yellow",
}


def table(found: Sequence[Status], width: int) -> Table:
    """Build a table of runs at most ``width`` characters wide. Less important columns are omitted if needed."""
    cells = {name: [show(status) for status in found] for name, show in COLUMNS.items()}
    wide = {name: max(map(cell_len, (name, *texts))) + 2 for name, texts in cells.items()}
    shown = list(COLUMNS)
    for name in _DISPENSABLE:
        if sum(wide[column] for column in shown) > width:
            shown.remove(name)
    made = Table(box=None)
    for name in shown:
        made.add_column(name, no_wrap=name != "run", overflow="fold")
    for i, status in enumerate(found):
        made.add_row(
            # rich would interpret square brackets of a plain string as markup
            *(Text(cells[name][i], _COLORS.get(status.state, "") if name == "state" else "") for name in shown)
        )
    return made


def figure(value: float | None) -> str:
    """Format a number with four significant digits, or None as "-"."""
    return "-" if value is None else f"{value:.4g}"


def span(seconds: float) -> str:
    """Format a duration in one unit: 90 s, 12 min, 5 h, 3 d."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"
