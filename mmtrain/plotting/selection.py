"""Pictures of what a model selected: the steps Δ of its mixers over a window of series, or over an image.

Also heat maps of the learned weights α, β, θ, γ of the weighted averaging.
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
#: The most names on an axis.
_VARIATES, _TIMES = 24, 6
#: The most maps in one row of the picture of an image.
_ABREAST = 6


@dataclass(frozen=True)
class StepMap:
    """The steps of one mixer, the mean over its features and scan directions, for the first sample of a batch.

    ``steps`` float32, all positive: of a mixer of ``kind`` "time" (variates, patches), "variate" (patches, variates),
    "image" (height, width) of its grid of tokens. ``name``: of the mixer in the model. ``label``: T1, C1, … as in the
    matrices of the averaging.
    """

    name: str
    label: str
    kind: str
    steps: NDArray[np.float32]

    @property
    def stack(self) -> str:
        """The name of the stack of mixers (a stage of ViM2, or TSM2's blocks)."""
        return self.name.partition(".mixers.")[0]


@dataclass(frozen=True)
class WindowSelection:
    """The step maps of one look-back window.

    ``past`` (lookback, M) in the units of the data; ``time`` (lookback,): times, or row numbers where there are none;
    ``starts`` (patches,): the place in the window at which each patch begins.
    """

    maps: list[StepMap]
    columns: list[str]
    past: NDArray[np.float32]
    time: NDArray[Any]
    starts: NDArray[np.int64]

    def patch_ticks(self, patches: int) -> tuple[NDArray[np.int64], list[str]]:
        """Some patches, named by the time at which they begin; those behind the look-back are auxiliary inputs."""
        ticks = np.unique(np.linspace(0, patches - 1, _TIMES).astype(int))
        starts = self.starts
        return ticks, [_time(self.time[starts[t]]) if t < len(starts) else "auxiliary" for t in ticks]


@dataclass(frozen=True)
class ImageSelection:
    """The step maps of one image; ``image`` (H, W, 3) or (H, W, 1) in 0..1, as the model saw it."""

    maps: list[StepMap]
    image: NDArray[np.float32]
    what: str


def draw_window_selection(path: Path, selection: WindowSelection) -> None:
    """The window itself, then one map a mixer: time mixers variates × patches, variate mixers patches × variates.

    Writes a PNG to ``path``. ``selection`` needs at least one map.
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
    figure.suptitle("what the model selected: bright is taken into the state, dark is passed by")
    save(figure, path)


def _draw_window(axis: Axes, selection: WindowSelection) -> None:
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


def _time(value: Any) -> str:
    """A row number, or a time to the minute."""
    return str(value.astype("datetime64[m]")).replace("T", " ") if isinstance(value, np.datetime64) else str(value)


def draw_image_selection(path: Path, selection: ImageSelection) -> None:
    """The image, and the map of each token mixer, stage by stage; every map has its own scale, written above it.

    Writes a PNG to ``path``. ``selection`` needs at least one map.
    """
    lines: list[tuple[str, list[StepMap]]] = []
    for stack, group in groupby(selection.maps, key=lambda m: m.stack):
        prefix, _, number = stack.rpartition(".")
        title = f"stage {int(number) + 1}" if prefix == "stages" and number.isdigit() else stack
        maps = list(group)
        lines += [(title, maps[i : i + _ABREAST]) for i in range(0, len(maps), _ABREAST)]
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
        f"{selection.what}: the mean step Δ of each token mixer\nbright is taken into the state, dark is passed by",
        fontsize=10,
    )
    save(figure, path)


#: The weights are written into their cells up to this number of rows.
_ANNOTATED = 10
_LABEL_COLORS = {"T": "#1f6f8b", "C": "#b5541c"}


@dataclass(frozen=True)
class AveragingMatrix:
    """The weights of one stack of mixers (a stage of ViM2, or all of TSM2).

    ``weights`` (rows, columns) float32: row i is the input of mixer ``rows[i]`` (the last one, ``out``, the stack's
    output), column j the earlier output ``columns[j]`` (the first one, ``x``, the stack's input); NaN where j is not
    earlier than i. The input's column is the sum of its two copies, y⁰_Token = y⁰_Channel = x.
    """

    name: str
    rows: list[str]
    columns: list[str]
    weights: NDArray[np.float32]

    def family(self, row: int, column: int) -> str:
        """The paper's letter: α, β (input of a token mixer), θ, γ (of a channel mixer); none for the output.

        The input's column holds both letters' weights, of its two copies.
        """
        token, channel = {"T": ("α", "β"), "C": ("θ", "γ")}.get(self.rows[row][0], ("", ""))
        if not token:
            return ""
        return {"T": token, "C": channel}.get(self.columns[column][0], f"{token}+{channel}")


def draw_averaging(path: Path, matrices: list[AveragingMatrix]) -> None:
    """One heat map for each stack, all in one colour scale, which is centred at the weights' initial value 1.

    Args:
        path: the PNG to write.
        matrices: at least one.
    """
    # fresh weights are all 1
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
    axes[0].set_ylabel("the input of …")
    figure.supxlabel("… is the sum of the earlier outputs, each with its weight", fontsize=10)
    figure.suptitle(
        "rows of token mixers: α × token, β × channel outputs; rows of channel mixers: θ × token, γ × channel outputs",
        fontsize=10,
    )
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="weight (1 at the start)")
    save(figure, path)
