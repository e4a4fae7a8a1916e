"""Charts as SVG elements for an HTML page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mmtrain.plotting import load_matplotlib, new_figure

Points = Sequence[tuple[float, float]]

#: A series with more points is thinned, which keeps the report of a long run small.
_MOST_POINTS = 800
_WIDTH, _HEIGHT = 4.2, 2.5


@dataclass(frozen=True)
class Series:
    """The curve of one run.

    Attributes:
        points: Pairs of step and value.
        color: Colour of the run.
        restarts: Steps from which the run was resumed.
        rollbacks: Steps to which the run returned after a loss spike.
    """

    points: Points
    color: str
    restarts: Sequence[float] = ()
    rollbacks: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """Curves of several runs in one figure.

    Attributes:
        title: Title of the chart, unique within a report.
        series: One curve per run.
        log: Use a logarithmic scale if the values differ by more than a factor of 30.
        marked: Draw a marker at each point.
    """

    title: str
    series: list[Series]
    log: bool = False
    marked: bool = False


def draw_chart(chart: Chart) -> Markup:
    """Return the chart as an ``<svg>`` element that contains its labels as text and refers to no other file."""
    from matplotlib.ticker import MaxNLocator

    # the salt gives each chart of a page other identifiers, which are the same in every report
    with load_matplotlib().rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.family": "sans-serif"}
    ):
        figure = new_figure(_WIDTH, _HEIGHT)
        axis = figure.subplots()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        for i, series in enumerate(chart.series):
            points = thinned(series.points)
            # earlier curves are wider, so that they remain visible below identical later ones
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
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True)
    return Markup(_inline(svg.getvalue(), chart.title))


def _inline(svg: str, name: str) -> str:
    """Return the ``<svg>`` element of an SVG file without metadata and namespaces.

    Args:
        svg: The text of the SVG file.
        name: A name that is unique within the page. It becomes the prefix of all identifiers.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", body)
    prefix = re.sub(r"\W", "", name) or "chart"
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    return re.sub(r"url\(#", f"url(#{prefix}-", body)


def thinned(points: Points) -> Points:
    """Return at most ``_MOST_POINTS`` points: the lowest and the highest of each interval, so that peaks remain."""
    if len(points) <= _MOST_POINTS:
        return points
    kept: list[tuple[float, float]] = []
    size = math.ceil(len(points) / (_MOST_POINTS / 2))
    for begin in range(0, len(points), size):
        interval = [point for point in points[begin : begin + size] if math.isfinite(point[1])]
        if interval:
            kept += sorted({min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])})
    return kept
