"""Throughput: how fast the runs went, and where the time of a step went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mmtrain.report.html import Markup, dot, joined, note, table
from mmtrain.report.model import Shown
from mmtrain.runs.status import number
from mmtrain.runs.table import figure

_PHASES = ("data", "forward", "backward", "optimizer", "communication", "other")
#: What is measured, by its key in a line of metrics, with what it is called and its factor.
_FIGURES = {
    "samples_per_second": ("samples/s", 1.0),
    "samples_per_second_per_rank": ("samples/s a rank", 1.0),
    "step_seconds": ("step, ms", 1000.0),
    "tflops": ("TFLOP/s a rank", 1.0),
    "mfu": ("of the peak, %", 100.0),
    "memory_peak_gib": ("peak memory, GiB", 1.0),
    "slowest_ratio": ("slowest rank / median", 1.0),
}
_STARTS = {"ready_seconds": "ready after, s", "first_step_seconds": "first step done after, s"}


def section(runs: Sequence[Shown]) -> Markup:
    """A table of the medians over the run, for the figures that any of the runs has."""
    rows = [(run, _medians(run)) for run in runs]
    rows = [(run, found) for run, found in rows if found]
    if not rows:
        return Markup("")
    names = [name for name in (*_columns(), *_STARTS.values()) if any(name in found for _, found in rows)]
    cells = [[name, *(found.get(name, "-") for _, found in rows)] for name in names]
    return joined(
        [
            table(["", *(joined([dot(run.color), run.name]) for run, _ in rows)], cells),
            note("Medians over the lines of metrics; phases as shares of a step; the start is that of the last job."),
        ]
    )


def _columns() -> list[str]:
    return [name for name, _ in _FIGURES.values()] + [f"{phase}, %" for phase in _PHASES]


def _medians(run: Shown) -> dict[str, str]:
    train = run.facts.of_kind("train")
    # the first line has the warming up in it
    lines = train[1:] if len(train) > 2 else train
    found = {}
    for key, (name, factor) in _FIGURES.items():
        values = [value for line in lines if (value := number(line, key)) is not None]
        if values:
            found[name] = figure(statistics.median(values) * factor)
    for phase in _PHASES:
        shares = [
            part / whole
            for line in lines
            if (part := number(line, f"{phase}_seconds")) is not None and (whole := number(line, "step_seconds"))
        ]
        if shares:
            found[f"{phase}, %"] = f"{100 * statistics.median(shares):.1f}"
    for line in run.facts.of_kind("start")[-1:]:
        found |= {name: figure(value) for key, name in _STARTS.items() if (value := number(line, key)) is not None}
    return found
