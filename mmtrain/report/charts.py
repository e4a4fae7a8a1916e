"""Charts as SVG that stands inside an HTML page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mmtrain.plotting import load_matplotlib, new_figure

Points = Sequence[tuple[float, float]]

#: A series of more points is thinned, so that the page of a long run stays small.
_MOST = 800
_WIDTH, _HEIGHT = 4.2, 2.5


@dataclass(frozen=True)
class Series:
    """The points of one run, and the steps at which it was started again or went back."""

    points: Points
    color: str
    restarts: Sequence[float] = ()
    rollbacks: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """``marked``: points are few, and each is shown. ``log``: on a logarithmic scale where the values are far apart."""

    title: str
    series: list[Series]
    log: bool = False
    marked: bool = False


def draw_chart(chart: Chart) -> Markup:
    """The chart as an ``<svg>`` element. Its text stays text; nothing in it points outside of the page."""
    from matplotlib.ticker import MaxNLocator

    # the salt makes the identifiers within the page differ from chart to chart, but not from one report to the next
    with load_matplotlib().rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.family": "sans-serif"}
    ):
        figure = new_figure(_WIDTH, _HEIGHT)
        axis = figure.subplots()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        for i, series in enumerate(chart.series):
            points = thinned(series.points)
            # an earlier one is broader, so that it shows below a later one that is the same
            width = 1.3 + min(0.9 * (len(chart.series) - 1 - i), 2.7)
            marker = "o" if chart.marked or len(points) == 1 else None
            axis.plot(*zip(*points, strict=True), color=series.color, lw=width, marker=marker, ms=3.5)
            for step in series.restarts:
                axis.axvline(step, ls=":", lw=1.5, color=series.color, alpha=0.7)
            for step in series.rollbacks:
                axis.axvline(step, ls="--", lw=1, color=series.color, alpha=0.7)
        values = [y for series in chart.series for _, y in series.points if math.isfinite(y)]
        if chart.log and values and min(values) > 0 and max(values) / min(values) > 30:
            axis.set_yscale("log")
        axis.set_title(chart.title, fontsize=10, loc="left", parse_math=False)
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.tick_params(labelsize=8)
        made = io.StringIO()
        figure.savefig(made, format="svg", transparent=True)
    return Markup(_inline(made.getvalue(), chart.title))


def _inline(svg: str, name: str) -> str:
    """The ``<svg>`` element of a file, without what only a file of its own needs.

    Args:
        name: differs from chart to chart of a page, and so do then the identifiers.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", body)
    prefix = re.sub(r"\W", "", name) or "chart"
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    return re.sub(r"url\(#", f"url(#{prefix}-", body)


def thinned(points: Points) -> Points:
    """At most as many points as a chart can show: the lowest and the highest of each stretch, so that no peak goes."""
    if len(points) <= _MOST:
        return points
    kept: list[tuple[float, float]] = []
    size = math.ceil(len(points) / (_MOST / 2))
    for begin in range(0, len(points), size):
        part = [point for point in points[begin : begin + size] if math.isfinite(point[1])]
        if part:
            kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept
