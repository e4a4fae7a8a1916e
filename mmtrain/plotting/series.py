"""Plots of series with their training, validation and test splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.plotting import HISTORY, line_axes, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SPLITS = {"train": "#dfe7ec", "val": "#f3d9a4", "test": "#f2b8b5"}
#: Maximum number of points of a line. Longer lines are drawn as the minimum and maximum of each segment.
_POINTS = 4000


@dataclass(frozen=True)
class Line:
    """One series to plot.

    Attributes:
        title: name of the series.
        values: (T,), NaN for missing values.
        stamps: (T,) times, or None for row numbers.
        borders: rows at which training, validation and test end.
    """

    title: str
    values: NDArray[np.floating]
    stamps: NDArray[np.datetime64] | None
    borders: tuple[int, int, int]


def draw_series(path: Path, title: str, lines: Sequence[Line]) -> None:
    """Plot each series in its own axes, one above the other, with the splits as coloured backgrounds."""
    figure = new_figure(13, 1.5 * len(lines) + 0.8)
    figure.suptitle(title, fontsize=10)
    for axis, line in zip(line_axes(figure, len(lines)), lines, strict=True):
        _draw(axis, line)
    save(figure, path)


def _draw(axis: Axes, line: Line) -> None:
    time: NDArray[Any] = np.arange(len(line.values)) if line.stamps is None else line.stamps
    begin = 0
    for (split, color), end in zip(_SPLITS.items(), line.borders, strict=True):
        if end > begin:
            edge = time[min(end, len(time) - 1)]
            axis.axvspan(time[begin], edge, color=color, lw=0, label=f"{split}: {end - begin}")
        begin = end
    x, y = _thin(time, line.values)
    axis.plot(x, y, color=HISTORY, lw=0.7)
    axis.set_title(line.title, fontsize=9, loc="left", pad=2)
    axis.tick_params(labelsize=7)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=3, fontsize=7, frameon=False, borderpad=0.2)
    axis.margins(x=0)


def _thin(time: NDArray[Any], values: NDArray[np.floating]) -> tuple[NDArray[Any], NDArray[np.floating]]:
    """Reduce a line to about :data:`_POINTS` points. Spikes and gaps of missing values remain visible."""
    size = -(-len(values) // (_POINTS // 2))
    if size < 2:
        return time, values
    count = len(values) // size
    pieces = values[: count * size].reshape(count, size)
    empty = np.isnan(pieces).all(axis=1, keepdims=True)
    safe = np.where(empty, 0, pieces)
    ends = np.stack([np.nanmin(safe, axis=1), np.nanmax(safe, axis=1)], axis=1)
    ends = np.where(empty, np.nan, ends)
    return np.repeat(time[: count * size : size], 2), ends.ravel()
