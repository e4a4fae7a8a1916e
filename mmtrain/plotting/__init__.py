"""Every picture: curves, forecasts, confusion matrices, splits, averaging weights and selections.

The functions take plain arrays and write a PNG; they know no model, no run and no data source. This module holds the
helpers that they share. matplotlib is imported here alone, and only when a figure is made, since it starts slowly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours of the observed past, of a forecast, and of the values that followed.
HISTORY, FORECAST, TRUTH = "#5b6770", "#d1495b", "#2e86ab"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` × ``height`` inches.

    pyplot is not used: it would look for a display and keep every figure.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_axes(figure: Figure, rows: int = 1, columns: int = 1) -> list[Axes]:
    """A grid of axes for lines: without top and right spines, with faint grid lines; row by row."""
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return axes


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG of 110 dots per inch to ``path``; an older file there is replaced."""
    figure.savefig(path, dpi=110)
