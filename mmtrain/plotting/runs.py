"""Plots of runs: training curves, forecasts and confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.plotting import FORECAST, HISTORY, TRUTH, line_axes, new_figure, save


def draw_curves(path: Path, lines: Sequence[dict[str, Any]], metrics: Sequence[str]) -> None:
    """Plot the loss, the evaluation ``metrics`` and the learning rate over the steps. Dotted lines mark restarts.

    Args:
        lines: the lines of ``metrics.jsonl``.
        metrics: names of the metrics; the first is drawn most clearly.
    """
    train = [line for line in lines if line["kind"] == "train"]
    figure = new_figure(13, 3.6)
    loss_axis, metric_axis, rate_axis = axes = line_axes(figure, 1, 3)
    steps = [line.get("step", nan) for line in train]
    loss_axis.plot(steps, [line.get("loss", nan) for line in train], color=FORECAST, label="train")
    rate_axis.plot(steps, [line.get("lr", nan) for line in train], color=HISTORY)
    for split, color in (("val", TRUTH), ("test", "black")):
        points = [line for line in lines if line["kind"] == "eval" and line.get("split") == split]
        if not points:
            continue
        marker = "o-" if split == "val" else "*"
        at = [p.get("step", nan) for p in points]
        if split == "val":
            loss_axis.plot(at, [p.get("loss", nan) for p in points], marker, ms=3, color=color, label=split)
        for i, name in enumerate(metrics):
            label = f"{split} {name}" + (f" {points[-1].get(name, nan):.4g}" if split == "test" else "")
            values, alpha = [p.get(name, nan) for p in points], max(1 - 0.5 * i, 0.2)
            metric_axis.plot(at, values, marker, color=color, alpha=alpha, ms=5, label=label)
    for line in lines:
        if line["kind"] == "resume":
            for axis in axes:
                axis.axvline(line.get("step", nan), ls=":", lw=0.8, color="gray")
    for axis, title in zip(axes, ("loss", ", ".join(metrics), "learning rate"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_forecast(
    path: Path,
    columns: Sequence[str],
    past: NDArray[np.floating],
    forecast: NDArray[np.floating],
    *,
    truth: NDArray[np.floating] | None = None,
    stamps: NDArray[np.datetime64] | None = None,
    most: int = 8,
) -> None:
    """Plot a forecast with the past and, if given, the true values. Each variate has its own axes.

    Args:
        columns: M names of the variates.
        past: (lookback, M) in the units of the data.
        forecast: (horizon, M) in the units of the data.
        truth: (horizon, M) in the units of the data.
        stamps: (lookback + horizon,) times, or None for row numbers.
        most: maximum number of variates to plot. If there are more, the title gives both numbers.
    """
    shown = min(len(columns), most)
    rows = -(-shown // 2)
    figure = new_figure(13, 2.3 * rows + 0.6)
    axes = line_axes(figure, rows, min(shown, 2))
    recent = min(len(past), 4 * len(forecast))
    time = np.arange(-len(past), len(forecast)) if stamps is None else np.asarray(stamps)
    before, after = time[len(past) - recent : len(past)], time[len(past) :]
    for i, axis in enumerate(axes):
        if i >= shown:
            axis.set_visible(False)
            continue
        axis.plot(before, past[-recent:, i], color=HISTORY, lw=1, label="history")
        if truth is not None:
            axis.plot(after, truth[:, i], color=TRUTH, lw=1.2, label="truth")
        axis.plot(after, forecast[:, i], color=FORECAST, lw=1.6, label="forecast")
        axis.set_title(columns[i], fontsize=10)
        axis.tick_params(axis="x", labelrotation=20, labelsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    if shown < len(columns):
        figure.suptitle(f"the first {shown} of {len(columns)} variates")
    save(figure, path)


def draw_confusion(path: Path, classes: Sequence[str], counts: NDArray[np.integer], note: str) -> None:
    """Plot a confusion matrix. Cells show counts; colours show fractions of the row.

    Args:
        classes: C class names.
        counts: (C, C); rows are true classes, columns are predicted classes.
        note: title of the plot.
    """
    size = len(classes)
    side = min(max(4.5, 0.45 * size + 2.2), 14)
    figure = new_figure(side, side)
    (axis,) = line_axes(figure)
    axis.grid(False)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [name if len(name) <= 16 else f"{name[:15]}…" for name in classes]
    axis.set_xticks(range(size), names, fontsize=8, rotation=90 if size > 10 else 30)
    axis.set_yticks(range(size), names, fontsize=8)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    axis.set_title(note, fontsize=10)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    save(figure, path)
