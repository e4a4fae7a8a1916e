"""Pictures of what was selected: the steps Δ over a window of series, or over an image."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.inspect.selection import ImageSelection, StepMap, WindowSelection
from mmtrain.models.tsm2 import VariateMixer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = "viridis"
#: Named on an axis at most.
_VARIATES, _TIMES = 24, 6
#: Maps in one row of the picture of an image.
_ABREAST = 6


def draw_window_selection(path: Path, selection: WindowSelection) -> None:
    """The window itself, then one map a mixer: time mixers variates × patches, variate mixers patches × variates.

    Writes a PNG to ``path``. ``selection`` needs at least one map.
    """
    from matplotlib.figure import Figure

    count, variates = len(selection.maps), len(selection.columns)
    lines = -(-count // 2)
    tall = min(max(2.6, 0.17 * variates + 1.2), 7)
    figure = Figure(figsize=(13, 2.2 + lines * tall), layout="constrained")
    grid = figure.add_gridspec(1 + lines, 2, height_ratios=[2.0, *[tall] * lines])
    _window(figure.add_subplot(grid[0, :]), selection)
    for i, found in enumerate(selection.maps):
        axis = figure.add_subplot(grid[1 + i // 2, i % 2])
        shown = axis.imshow(found.steps, aspect="auto", cmap=_COLOURS, interpolation="nearest")
        figure.colorbar(shown, ax=axis, label="mean step Δ")
        by_variate = isinstance(found.mixer, VariateMixer)
        kind, along = ("variate", "variates") if by_variate else ("time", "patches")
        axis.set_title(f"{found.label} ({kind} mixer): the scan runs along the {along} →", fontsize=10)
        patches = found.steps.shape[0 if by_variate else 1]
        (_name_times_y if by_variate else _name_times_x)(axis, selection, patches)
        _name_variates(axis, selection.columns, on_x=by_variate)
    figure.suptitle("what the model selected: bright is taken into the state, dark is passed by")
    figure.savefig(path, dpi=110)


def _window(axis: Axes, selection: WindowSelection) -> None:
    """Each variate of the window, brought to one scale."""
    past, shown = selection.past, min(len(selection.columns), 8)
    scaled = (past - past.mean(0)) / np.maximum(past.std(0), 1e-9)
    for i in range(shown):
        axis.plot(scaled[:, i], lw=0.8, label=selection.columns[i])
    axis.margins(x=0)
    ticks = np.linspace(0, len(past) - 1, _TIMES).astype(int)
    axis.set_xticks(ticks, [_time(t) for t in selection.time[ticks]], fontsize=8)
    axis.set_yticks([])
    left_out = f" (the first {shown} of {len(selection.columns)} variates)" if shown < len(selection.columns) else ""
    axis.set_title(f"the look-back window, each variate standardised{left_out}", fontsize=10)
    axis.legend(fontsize=7, ncols=shown, loc="upper left", framealpha=0.7)


def _patch_ticks(selection: WindowSelection, patches: int) -> tuple[NDArray[np.int64], list[str]]:
    """Some patches, named by the time at which they begin; those behind the look-back are auxiliary inputs."""
    ticks = np.unique(np.linspace(0, patches - 1, _TIMES).astype(int))
    starts = selection.starts
    return ticks, [_time(selection.time[starts[t]]) if t < len(starts) else "auxiliary" for t in ticks]


def _name_times_x(axis: Axes, selection: WindowSelection, patches: int) -> None:
    axis.set_xticks(*_patch_ticks(selection, patches), fontsize=8, rotation=20, ha="right")


def _name_times_y(axis: Axes, selection: WindowSelection, patches: int) -> None:
    axis.set_yticks(*_patch_ticks(selection, patches), fontsize=8)


def _name_variates(axis: Axes, columns: list[str], *, on_x: bool) -> None:
    ticks = np.unique(np.linspace(0, len(columns) - 1, min(len(columns), _VARIATES)).astype(int))
    names = [columns[t] for t in ticks]
    if on_x:
        long = max(len(name) for name in names) * len(names) > 60
        axis.set_xticks(ticks, names, fontsize=8, rotation=60 if long else 0, ha="right" if long else "center")
    else:
        axis.set_yticks(ticks, names, fontsize=8)


def _time(value: Any) -> str:
    """A row number, or a time to the minute."""
    return str(value.astype("datetime64[m]")).replace("T", " ") if isinstance(value, np.datetime64) else str(value)


def draw_image_selection(path: Path, selection: ImageSelection) -> None:
    """The image, and the map of each token mixer, stage by stage; every map has its own scale, written above it.

    Writes a PNG to ``path``. ``selection`` needs at least one map.
    """
    from matplotlib.figure import Figure

    lines: list[tuple[str, list[StepMap]]] = []
    for stage, group in groupby(selection.maps, key=lambda m: m.stack):
        maps = list(group)
        lines += [(stage, maps[i : i + _ABREAST]) for i in range(0, len(maps), _ABREAST)]
    across = 1 + max(len(maps) for _, maps in lines)
    figure = Figure(figsize=(2.2 * across, 2.4 * len(lines) + 0.6), layout="constrained")
    axes = figure.subplots(len(lines), across, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (stage, maps) in zip(axes, lines, strict=True):
        line[0].imshow(selection.image, cmap="gray", vmin=0, vmax=1)
        line[0].set_title(_stage_title(stage), fontsize=10)
        for axis, found in zip(line[1:], maps, strict=False):
            axis.imshow(found.steps, cmap=_COLOURS, interpolation="nearest")
            h, w = found.steps.shape
            scale = f"{h}×{w} tokens, Δ {found.steps.min():.3g} to {found.steps.max():.3g}"
            axis.set_title(f"{found.label}\n{scale}", fontsize=8)
    figure.suptitle(
        f"{selection.what}: the mean step Δ of each token mixer\nbright is taken into the state, dark is passed by",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def _stage_title(stack: str) -> str:
    """``stages.0`` as ``stage 1``."""
    prefix, _, number = stack.rpartition(".")
    return f"stage {int(number) + 1}" if prefix == "stages" and number.isdigit() else stack
