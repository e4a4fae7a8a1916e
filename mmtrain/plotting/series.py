"""Pictures of series before training on them, with the splits marked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.split import RATIOS, SplitRule, guess_split
from mmtrain.errors import UserError
from mmtrain.plotting import HISTORY, line_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mmtrain.data.series.describe import PanelReport, TableReport
    from mmtrain.data.series.panel import Panel

_SPLITS = {"train": "#dfe7ec", "val": "#f3d9a4", "test": "#f2b8b5"}
_MOST = 8
#: Points of a line: of more, the lowest and the highest of each piece are drawn.
_POINTS = 4000


def draw_table(path: Path, report: TableReport, rule: SplitRule | None = None) -> None:
    """The columns of a table, one above the other. ``rule`` None: the split of the benchmarks for its name."""
    from mmtrain.data.series.table import read_table

    numeric = [column.name for column in report.columns if column.kind == "number"]
    if not numeric:
        raise UserError(f"{report.path}: there is no column of numbers to draw")
    table = read_table(report.path, columns=numeric, missing="mask")
    if rule is None:
        guess = guess_split(report.path.stem)
        rule = SplitRule(guess) if isinstance(guess, str) else SplitRule("ratio", parts=RATIOS)
    borders = rule.cut_table(len(table.values), table.stamps, report.path).borders
    shown = numeric[:_MOST]
    axes = _rows(path.stem, len(shown), f"{report.path.name}: {_of(shown, numeric, 'columns')}{rule}")
    time: NDArray[Any] = np.arange(len(table.values)) if table.stamps is None else table.stamps
    for place, (axis, name) in enumerate(zip(axes, shown, strict=True)):
        _draw(axis, time, table.values[:, place], name, borders)
    _save(path, axes)


def draw_panel(path: Path, panel: Panel, report: PanelReport, rule: SplitRule | None = None) -> None:
    """The first column of some series of a panel. ``rule`` None: the split that it was prepared with."""
    if rule is None:
        saved = panel.meta["split"]
        rule = SplitRule.make(saved["split"], saved.get("parts"), saved.get("dates"), saved.get("last"))
    borders = rule.cut_panel(panel.lengths, panel.first, panel.timeline)
    shown = report.examples[:_MOST]
    axes = _rows(path.stem, len(shown), f"{report.path.name}: {len(shown)} of {len(panel)} series; {rule}")
    for axis, one in zip(axes, shown, strict=True):
        stamps = panel.stamps(one.number, 0, one.rows)
        time: NDArray[Any] = np.arange(one.rows) if stamps is None else stamps
        a, b, c = (int(border) for border in borders[one.number])
        title = f"{one.id} · {panel.columns[0]}" + (f" ({one.why})" if one.why else "")
        _draw(axis, time, panel.series(one.number)[:, 0], title, (a, b, c))
    _save(path, axes)


def _of(shown: list[str], every: list[str], what: str) -> str:
    return f"the first {len(shown)} of {len(every)} {what}; " if len(shown) < len(every) else ""


def _rows(name: str, count: int, title: str) -> list[Axes]:
    figure = new_figure(13, 1.5 * count + 0.8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return line_axes(figure, count)


def _draw(
    axis: Axes, time: NDArray[Any], values: NDArray[np.float32], title: str, borders: tuple[int, int, int]
) -> None:
    begin = 0
    for (split, color), end in zip(_SPLITS.items(), borders, strict=True):
        if end > begin:
            edge = time[min(end, len(time) - 1)]
            axis.axvspan(time[begin], edge, color=color, lw=0, label=f"{split}: {end - begin}")
        begin = end
    x, y = _thin(time, values)
    axis.plot(x, y, color=HISTORY, lw=0.7)
    axis.set_title(title, fontsize=9, loc="left", pad=2, parse_math=False)
    axis.tick_params(labelsize=7)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=3, fontsize=7, frameon=False, borderpad=0.2)
    axis.margins(x=0)


def _thin(time: NDArray[Any], values: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """At most about :data:`_POINTS` points, spikes and holes kept."""
    size = -(-len(values) // (_POINTS // 2))
    if size < 2:
        return time, values
    count = len(values) // size
    pieces = values[: count * size].reshape(count, size)
    empty = np.isnan(pieces).all(axis=1, keepdims=True)
    safe = np.where(empty, 0, pieces)
    ends = np.stack([np.nanmin(safe, axis=1), np.nanmax(safe, axis=1)], axis=1)
    ends = np.where(empty, np.nan, ends).astype(np.float32)
    return np.repeat(time[: count * size : size], 2), ends.ravel()


def _save(path: Path, axes: list[Axes]) -> None:
    figure: Any = axes[0].figure
    figure.savefig(path, dpi=110)
