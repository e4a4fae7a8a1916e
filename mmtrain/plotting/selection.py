"""Plots of the step sizes Δ of the mixers over a window of a series or over an image.

A large Δ means that the selective scan takes the input into its state; a small Δ means that it ignores the input. This
module also plots heat maps of the learned weights α, β, θ, γ of the weighted averaging.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.plotting import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_COLORMAP = "viridis"
#: Maximum numbers of names of variates and of times on an axis.
_VARIATES, _TIMES = 24, 6
#: Maximum number of maps in one row of the plot of an image.
_MAPS_PER_ROW = 6


@dataclass(frozen=True)
class StepMap:
    """The step sizes Δ of one mixer, averaged over features and scan directions, for the first sample of a batch.

    Attributes:
        name: module name of the mixer in the model.
        label: T1, C1, … as in the matrices of the averaging.
        kind: "time", "variate" or "image".
        steps: float32, positive. Shape by kind: "time" (variates, patches); "variate" (patches, variates); "image"
            (height, width) of the grid of tokens.
    """

    name: str
    label: str
    kind: str
    steps: NDArray[np.float32]

    @property
    def stack(self) -> str:
        """The module name of the stack that contains the mixer (a stage of ViM2, or the blocks of TSM2)."""
        return self.name.partition(".mixers.")[0]


@dataclass(frozen=True)
class WindowSelection:
    """The step maps of one lookback.

    Attributes:
        maps: one map per mixer.
        columns: M names of the variates.
        past: (lookback, M) in the units of the data.
        time: (lookback,) times, or row numbers if there are no times.
        starts: (patches,) position in the lookback at which each patch begins.
    """

    maps: list[StepMap]
    columns: list[str]
    past: NDArray[np.float32]
    time: NDArray[Any]
    starts: NDArray[np.int64]

    def patch_ticks(self, patches: int) -> tuple[NDArray[np.int64], list[str]]:
        """Return the positions and labels of some ticks along the patches.

        A label is the start time of the patch. Patches after the lookback encode auxiliary inputs.
        """
        ticks = np.unique(np.linspace(0, patches - 1, _TIMES).astype(int))
        starts = self.starts
        return ticks, [_time(self.time[starts[t]]) if t < len(starts) else "auxiliary" for t in ticks]


@dataclass(frozen=True)
class ImageSelection:
    """The step maps of one image.

    Attributes:
        maps: one map per token mixer.
        image: (H, W, 3) or (H, W, 1) in [0, 1]: the input of the model.
        what: a description of the image for the title.
    """

    maps: list[StepMap]
    image: NDArray[np.float32]
    what: str


def draw_window_selection(path: Path, selection: WindowSelection) -> None:
    """Plot a lookback and below it one heat map of Δ for each mixer, to the PNG file ``path``.

    Maps of time mixers are variates × patches, those of variate mixers patches × variates.

    Args:
        selection: at least one map.
    """
    variates = len(selection.columns)
    lines = -(-len(selection.maps) // 2)
    tall = min(max(2.6, 0.17 * variates + 1.2), 7)
    figure = new_figure(13, 2.2 + lines * tall)
    grid = figure.add_gridspec(1 + lines, 2, height_ratios=[2.0, *[tall] * lines])
    _draw_window(figure.add_subplot(grid[0, :]), selection)
    named = np.unique(np.linspace(0, variates - 1, min(variates, _VARIATES)).astype(int))
    names = [selection.columns[i] for i in named]
    long = max(len(name) for name in names) * len(names) > 60
    for i, found in enumerate(selection.maps):
        axis = figure.add_subplot(grid[1 + i // 2, i % 2])
        shown = axis.imshow(found.steps, aspect="auto", cmap=_COLORMAP, interpolation="nearest")
        figure.colorbar(shown, ax=axis, label="mean step Δ")
        if found.kind == "variate":
            axis.set_yticks(*selection.patch_ticks(found.steps.shape[0]), fontsize=8)
            axis.set_xticks(named, names, fontsize=8, rotation=60 if long else 0, ha="right" if long else "center")
        else:
            axis.set_xticks(*selection.patch_ticks(found.steps.shape[1]), fontsize=8, rotation=20, ha="right")
            axis.set_yticks(named, names, fontsize=8)
        along = "variates" if found.kind == "variate" else "patches"
        axis.set_title(f"{found.label} ({found.kind} mixer): the scan runs along the {along} →", fontsize=10)
    figure.suptitle("Selection by the model: bright inputs enter the state of the scan, dark inputs are ignored")
    save(figure, path)


def _draw_window(axis: Axes, selection: WindowSelection) -> None:
    """Plot the standardised variates of the lookback."""
    past, shown = selection.past, min(len(selection.columns), 8)
    scaled = (past - past.mean(0)) / np.maximum(past.std(0), 1e-9)
    for i in range(shown):
        axis.plot(scaled[:, i], lw=0.8, label=selection.columns[i])
    axis.margins(x=0)
    ticks = np.linspace(0, len(past) - 1, _TIMES).astype(int)
    axis.set_xticks(ticks, [_time(t) for t in selection.time[ticks]], fontsize=8)
    axis.set_yticks([])
    left_out = f" (the first {shown} of {len(selection.columns)} variates)" if shown < len(selection.columns) else ""
    axis.set_title(f"lookback, each variate standardised{left_out}", fontsize=10)
    axis.legend(fontsize=7, ncols=shown, loc="upper left", framealpha=0.7)


def _time(value: Any) -> str:
    """Format a row number, or a time to the minute."""
    return str(value.astype("datetime64[m]")).replace("T", " ") if isinstance(value, np.datetime64) else str(value)


def draw_image_selection(path: Path, selection: ImageSelection) -> None:
    """Plot an image and the map of Δ of each token mixer, stage by stage, to the PNG file ``path``.

    Each map has its own colour scale, whose limits are written above it.

    Args:
        selection: at least one map.
    """
    lines: list[tuple[str, list[StepMap]]] = []
    for stack, group in groupby(selection.maps, key=lambda m: m.stack):
        prefix, _, number = stack.rpartition(".")
        title = f"stage {int(number) + 1}" if prefix == "stages" and number.isdigit() else stack
        maps = list(group)
        lines += [(title, maps[i : i + _MAPS_PER_ROW]) for i in range(0, len(maps), _MAPS_PER_ROW)]
    across = 1 + max(len(maps) for _, maps in lines)
    figure = new_figure(2.2 * across, 2.4 * len(lines) + 0.6)
    axes = figure.subplots(len(lines), across, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (title, maps) in zip(axes, lines, strict=True):
        line[0].imshow(selection.image, cmap="gray", vmin=0, vmax=1)
        line[0].set_title(title, fontsize=10)
        for axis, found in zip(line[1:], maps, strict=False):
            axis.imshow(found.steps, cmap=_COLORMAP, interpolation="nearest")
            h, w = found.steps.shape
            scale = f"{h}×{w} tokens, Δ {found.steps.min():.3g} to {found.steps.max():.3g}"
            axis.set_title(f"{found.label}\n{scale}", fontsize=8)
    figure.suptitle(
        f"{selection.what}: mean step Δ of each token mixer\nbright inputs enter the state of the scan, dark inputs are"
        " ignored",
        fontsize=10,
    )
    save(figure, path)


#: Weights are written into the cells of matrices with at most this number of rows.
_ANNOTATED = 10
_LABEL_COLORS = {"T": "#1f6f8b", "C": "#b5541c"}


@dataclass(frozen=True)
class AveragingMatrix:
    """The averaging weights of one stack of mixers (a stage of ViM2, or all blocks of TSM2).

    Attributes:
        name: name of the stack.
        rows: the mixers whose inputs are averaged. The last one, "out", is the output of the stack.
        columns: the outputs that are averaged. The first one, "x", is the input of the stack.
        weights: (rows, columns) float32, NaN for outputs that are not earlier than the mixer. The column "x" is the
            sum of the weights of its two copies, y⁰_Token = y⁰_Channel = x.
    """

    name: str
    rows: list[str]
    columns: list[str]
    weights: NDArray[np.float32]

    def family(self, row: int, column: int) -> str:
        """Return the paper's letter for a weight: α or β for token mixers, θ or γ for channel mixers, "" for "out".

        The column "x" has both letters, because it is the sum of two weights.
        """
        token, channel = {"T": ("α", "β"), "C": ("θ", "γ")}.get(self.rows[row][0], ("", ""))
        if not token:
            return ""
        return {"T": token, "C": channel}.get(self.columns[column][0], f"{token}+{channel}")


def draw_averaging(path: Path, matrices: list[AveragingMatrix]) -> None:
    """Plot one heat map of averaging weights for each stack. All use one colour scale, centred at the initial value 1.

    Args:
        path: the PNG file to write.
        matrices: at least one.
    """
    # untrained weights are all 1, so the scale needs a minimum width
    distance = max(1e-3, *(float(np.nanmax(np.abs(m.weights - 1))) for m in matrices))
    cells = [len(m.rows) for m in matrices]
    sizes = [count * (0.55 if count <= _ANNOTATED else 0.3) + 0.4 for count in cells]
    figure = new_figure(max(8.0, sum(sizes) + 1.2 * len(sizes) + 1), max(sizes) + 1.7)
    axes = figure.subplots(1, len(matrices), squeeze=False, width_ratios=sizes)[0]
    for axis, matrix, count in zip(axes, matrices, cells, strict=True):
        image = axis.imshow(matrix.weights, cmap="RdBu_r", vmin=1 - distance, vmax=1 + distance)
        axis.set_title(matrix.name, fontsize=10)
        axis.set_xticks(range(count), matrix.columns, fontsize=8, rotation=90 if count > _ANNOTATED else 0)
        axis.set_yticks(range(count), matrix.rows, fontsize=8)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_color(_LABEL_COLORS.get(label.get_text()[:1], "black"))
        axis.spines[:].set_visible(False)
        if count > _ANNOTATED:
            continue
        for i, j in np.argwhere(np.isfinite(matrix.weights)):
            weight = matrix.weights[i, j]
            color = "white" if abs(weight - 1) > 0.6 * distance else "black"
            text = f"{matrix.family(i, j)}\n{weight:.2f}".strip()
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axes[0].set_ylabel("input of this mixer")
    figure.supxlabel("is the sum of these earlier outputs, each multiplied by its weight", fontsize=10)
    figure.suptitle(
        "rows of token mixers: α × token, β × channel outputs; rows of channel mixers: θ × token, γ × channel outputs",
        fontsize=10,
    )
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="weight (initially 1)")
    save(figure, path)
