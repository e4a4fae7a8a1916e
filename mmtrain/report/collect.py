"""Content of a report as plain data, without HTML."""

from __future__ import annotations

import base64
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.report.charts import Chart, Series
from mmtrain.runs.reader import Line, RunRecord, read_run
from mmtrain.runs.status import METRICS, Status, number, observe, status
from mmtrain.runs.table import COLUMNS, figure

#: Colours of the runs; they repeat if there are more runs.
_COLORS = ("#2e6f95", "#d1495b", "#3a8f5c", "#c9852c", "#6c5b9e", "#5b6770", "#b0508f", "#1c9aa0")
#: A larger plot is named but not included, so that a report can be sent by mail.
_MOST_BYTES = 4 * 2**20
_FAULTS = ("*faults*.jsonl", "*/*faults*.jsonl")
#: Largest number of lines shown of a file of data faults.
_MOST_FAULTS = 200


@dataclass(frozen=True)
class Run:
    """A run with its name and colour in the report."""

    name: str
    color: str
    record: RunRecord
    status: Status

    def cells(self) -> dict[str, str]:
        """Return state, progress and results by column, with the columns of `mmtrain runs` except the folder."""
        return {name: show(self.status) for name, show in COLUMNS.items() if name != "run"}

    def configuration(self) -> str:
        """Return the text of config.yaml, or the reason why it cannot be read."""
        try:
            return (self.record.path / "config.yaml").read_text(errors="replace")
        except OSError as error:
            return f"cannot be read: {error.strerror}"


@dataclass(frozen=True)
class Picture:
    """A plot of a run. ``source`` is the file as a data URL, or "" if ``problem`` says why it is not included."""

    run: Run
    file: Path
    source: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Event:
    """An event in the journal of a run (jobs.jsonl), such as a start or an end."""

    run: Run
    time: str
    kind: str
    job: object
    details: str


@dataclass(frozen=True)
class Excerpt:
    """The text of a file in a section that opens on a click."""

    run: Run
    title: str
    text: str


@dataclass(frozen=True)
class Report:
    """The content of a report. Empty sections are not shown.

    Attributes:
        title: Title of the page.
        runs: The runs, in the given order.
        charts: The curves.
        remarks: Explanation of the lines in the charts, and of damaged metrics.
        pictures: The plots found in the run folders.
        speed: Runs with their figures by name; runs without figures are left out.
        speed_names: Names of all figures, in the order of the rows.
        differences: Keys whose values are not the same in all configurations, with the value in each configuration
            (None where it is missing).
        events: Lines of the journals.
        failures: Errors of failed jobs.
        faults: Lists of data faults.
    """

    title: str
    runs: list[Run]
    charts: list[Chart]
    remarks: str
    pictures: list[Picture]
    speed: list[tuple[Run, dict[str, str]]]
    speed_names: list[str]
    differences: dict[str, list[str | None]]
    events: list[Event]
    failures: list[Excerpt]
    faults: list[Excerpt]


def collect(paths: Sequence[Path]) -> Report:
    """Read the run folders ``paths`` and return the content of their report."""
    records = [read_run(path, recent=None) for path in dict.fromkeys(paths)]
    environment = observe(records)
    names = distinct_names([record.path for record in records])
    runs = [
        Run(name, _COLORS[i % len(_COLORS)], record, status(record, environment))
        for i, (name, record) in enumerate(zip(names, records, strict=True))
    ]
    speed = [(run, figures) for run in runs if (figures := _speed(run.record))]
    remarks = {
        "resume": "dotted line: the run was resumed from this step",
        "rollback": "dashed line: the run returned to this step after a loss spike",
    }
    return Report(
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        runs=runs,
        charts=_charts(runs),
        remarks="; ".join(
            [text for kind, text in remarks.items() if any(run.record.of_kind(kind) for run in runs)]
            + [
                f"damaged lines of {run.record.path / 'metrics.jsonl'} were ignored; the first is line {line}"
                for run in runs
                if (line := run.record.damaged) is not None
            ]
        ),
        pictures=[picture for run in runs for picture in _pictures(run)],
        speed=speed,
        speed_names=[name for name in _SPEED_NAMES if any(name in figures for _, figures in speed)],
        differences=differences([flattened(run.record.settings) for run in runs]),
        events=[_event(run, line) for run in runs for line in run.record.journal],
        failures=[excerpt for run in runs for excerpt in _excerpts(run, "failure.txt")],
        faults=[excerpt for run in runs for excerpt in _excerpts(run, *_FAULTS, most=_MOST_FAULTS)],
    )


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the last component of each path, or as many components as needed to make all names distinct."""
    whole = [path.resolve().parts for path in paths]
    longest = max((len(parts) for parts in whole), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


# ---------------------------------------------------------------- curves

#: Tuples of title, key in metrics.jsonl, and whether the scale may be logarithmic.
_CURVES = (
    ("learning rate", "lr", False),
    ("gradient norm", "grad_norm", True),
    ("samples/s", "samples_per_second", False),
    ("averaging α: distance from its initial value", "averaging_alpha", False),
    ("averaging β: distance from its initial value", "averaging_beta", False),
    ("averaging θ: distance from its initial value", "averaging_theta", False),
    ("averaging γ: distance from its initial value", "averaging_gamma", False),
)


def _charts(runs: Sequence[Run]) -> list[Chart]:
    """Return one chart for each quantity that at least one run has recorded. Each chart shows all runs."""
    metrics = {METRICS.get(str(run.record.setting("task.kind")), ("loss", min))[0] for run in runs}
    measured = sorted(metrics - {"loss"})
    if metrics != {"mse"}:  # the mean squared error of a forecaster is its loss
        measured = ["loss", *measured]
    charts = [_chart(runs, "train loss", "loss")]
    charts += [_chart(runs, f"val {name}", name, "eval") for name in measured]
    charts += [_chart(runs, title, key, log=log) for title, key, log in _CURVES]
    return [chart for chart in charts if chart.series]


def _chart(runs: Sequence[Run], title: str, key: str, kind: str = "train", *, log: bool = False) -> Chart:
    series = []
    for run in runs:
        lines = [line for line in run.record.of_kind(kind) if line.get("split", "val") == "val"]
        pairs = ((number(line, "step"), number(line, key)) for line in lines)
        points = [(step, value) for step, value in pairs if step is not None and value is not None]
        if points:
            restarts, rollbacks = (_steps(run.record.of_kind(event)) for event in ("resume", "rollback"))
            series.append(Series(points, run.color, restarts, rollbacks))
    return Chart(title, series, log=log, marked=kind == "eval")


def _steps(lines: Iterable[Line]) -> list[float]:
    return [step for line in lines if (step := number(line, "step")) is not None]


# ---------------------------------------------------------------- speed

_PHASES = ("data", "forward", "backward", "optimizer", "communication", "other")
#: Maps keys of metrics.jsonl to the name of the figure and the factor of its unit.
_FIGURES = {
    "samples_per_second": ("samples/s", 1.0),
    "samples_per_second_per_rank": ("samples/s per rank", 1.0),
    "step_seconds": ("step, ms", 1000.0),
    "tflops": ("TFLOP/s per rank", 1.0),
    "mfu": ("share of peak FLOP/s, %", 100.0),
    "memory_peak_gib": ("peak memory, GiB", 1.0),
    "slowest_ratio": ("slowest rank / median rank", 1.0),
}
_STARTS = {"ready_seconds": "start until ready, s", "first_step_seconds": "start until first step done, s"}
_SPEED_NAMES = [*(name for name, _ in _FIGURES.values()), *(f"{phase}, %" for phase in _PHASES), *_STARTS.values()]


def _speed(record: RunRecord) -> dict[str, str]:
    """Return the medians of the recorded figures over the run, as text."""
    train = record.of_kind("train")
    lines = train[1:] if len(train) > 2 else train  # the first line includes the warm-up
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
    for line in record.of_kind("start")[-1:]:
        found |= {name: figure(value) for key, name in _STARTS.items() if (value := number(line, key)) is not None}
    return found


# ---------------------------------------------------------------- configurations


def differences(flat: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Return the keys whose values differ, with the value in each configuration, or None where the key is missing."""
    missing = object()
    found: dict[str, list[str | None]] = {}
    for key in sorted({key for each in flat for key in each}):
        values = [each.get(key, missing) for each in flat]
        if any(value != values[0] for value in values):
            found[key] = [None if v is missing else "null" if v is None else str(v) for v in values]
    return found


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their full key, such as ``{"train.epochs": 3}``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


# ---------------------------------------------------------------- files and jobs


def _pictures(run: Run) -> Iterable[Picture]:
    """Yield all plots in the run folder except curves.png, because the report has its own charts."""
    for file in sorted(run.record.path.glob("*.png")):
        try:
            content = b"" if file.name == "curves.png" else file.read_bytes()
        except OSError:
            continue
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):  # an incomplete file
            continue
        if len(content) > _MOST_BYTES:
            size = f"{len(content) / 2**20:.0f} MiB"
            yield Picture(run, file, problem=f"{file} is not included, because it is too large ({size})")
        else:
            yield Picture(run, file, "data:image/png;base64," + base64.b64encode(content).decode())


def _event(run: Run, line: Line) -> Event:
    moment = number(line, "time")
    when = "-" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    job = line.get("job") or (f"process {line['pid']}" if line.get("pid") else "-")
    details = [
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in line.items()
        if key not in ("kind", "time", "job", "pid") and value is not None
    ]
    return Event(run, when, line["kind"], job, "; ".join(details))


def _excerpts(run: Run, *patterns: str, most: int | None = None) -> Iterable[Excerpt]:
    """Yield the files that match ``patterns`` and are not empty, with at most ``most`` lines each."""
    folder = run.record.path
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        if not lines:
            continue
        title = str(file.relative_to(folder))
        if most is not None:
            title += f", {len(lines)} lines"
            if len(lines) > most:
                lines[most:] = [f"… and {len(lines) - most} more"]
        yield Excerpt(run, title, "\n".join(lines))
