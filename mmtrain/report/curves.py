"""The curves of the runs: which there are, and what of the lines of metrics they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmtrain.report.figures import Chart, Series, draw
from mmtrain.report.html import Markup, dot, element, joined, note
from mmtrain.report.model import Shown
from mmtrain.runs.reader import Line
from mmtrain.runs.status import METRICS, number


@dataclass(frozen=True)
class _Curve:
    title: str
    key: str
    kind: str = "train"
    log: bool = False


_CURVES = (
    _Curve("train loss", "loss"),
    _Curve("learning rate", "lr"),
    _Curve("gradient norm", "grad_norm", log=True),
    _Curve("samples/s", "samples_per_second"),
    *(
        _Curve(f"averaging {letter}: distance from its start", f"averaging_{name}")
        for letter, name in (("α", "alpha"), ("β", "beta"), ("θ", "theta"), ("γ", "gamma"))
    ),
)


def section(runs: Sequence[Shown]) -> Markup:
    """A chart a curve, all runs in each; nothing where no run has written a line."""
    metrics = {METRICS.get(str(run.facts.setting("task.kind")), ("loss", min))[0] for run in runs}
    measured = [_Curve(f"val {name}", name, "eval") for name in dict.fromkeys(["loss", *sorted(metrics)])]
    if metrics == {"mse"}:  # it is the loss of a forecaster
        measured = measured[1:]
    curves = [_CURVES[0], *measured, *_CURVES[1:]]
    charts = [chart for curve in curves if (chart := _chart(curve, runs)).series]
    if not charts:
        return Markup("")
    legend = element("div", *(element("span", dot(run.color), run.name) for run in runs), class_="legend")
    drawn = element("div", *(draw(chart) for chart in charts), class_="grid")
    return joined([legend if len(runs) > 1 else "", drawn, _remark(runs)])


def _chart(curve: _Curve, runs: Sequence[Shown]) -> Chart:
    series = []
    for run in runs:
        points = [point for line in run.facts.of_kind(curve.kind) if (point := _point(curve, line)) is not None]
        if points:
            restarts = _steps(run.facts.of_kind("resume"))
            series.append(Series(points, run.color, restarts, _steps(run.facts.of_kind("rollback"))))
    return Chart(curve.title, series, log=curve.log, marked=curve.kind == "eval")


def _point(curve: _Curve, line: Line) -> tuple[float, float] | None:
    if line.get("split", "val") != "val":
        return None
    step, value = number(line, "step"), number(line, curve.key)
    return None if step is None or value is None else (step, value)


def _steps(lines: Sequence[Line]) -> list[float]:
    return [step for line in lines if (step := number(line, "step")) is not None]


def _remark(runs: Sequence[Shown]) -> Markup:
    words = []
    if any(run.facts.of_kind("resume") for run in runs):
        words.append("dotted: the run was started again and went on from there")
    if any(run.facts.of_kind("rollback") for run in runs):
        words.append("dashed: the loss jumped and the run went back to there")
    return note("; ".join(words)) if words else Markup("")
