"""What a report shows of its runs, as plain data: nothing here is HTML."""

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

#: One colour for each run; with more runs they come again.
_COLORS = ("#2e6f95", "#d1495b", "#3a8f5c", "#c9852c", "#6c5b9e", "#5b6770", "#b0508f", "#1c9aa0")
#: A larger picture is named, not shown: a report can be sent by mail.
_MOST_BYTES = 4 * 2**20
_FAULTS = ("*faults*.jsonl", "*/*faults*.jsonl")
#: The most lines of a file of faults that are shown.
_MOST_FAULTS = 200


@dataclass(frozen=True)
class Run:
    """A run, with its name and colour in the report."""

    name: str
    color: str
    record: RunRecord
    status: Status

    def cells(self) -> dict[str, str]:
        """State, progress and results by the columns of `mmtrain runs`, but the folder."""
        return {name: show(self.status) for name, show in COLUMNS.items() if name != "run"}

    def configuration(self) -> str:
        try:
            return (self.record.path / "config.yaml").read_text(errors="replace")
        except OSError as error:
            return f"cannot be read: {error.strerror}"


@dataclass(frozen=True)
class Picture:
    """``source``: the file as a data URL; without it, ``problem`` says why the picture is not shown."""

    run: Run
    file: Path
    source: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Event:
    """A line of a run's journal."""

    run: Run
    time: str
    kind: str
    job: object
    details: str


@dataclass(frozen=True)
class Excerpt:
    """The text of a file, shown on a click."""

    run: Run
    title: str
    text: str


@dataclass(frozen=True)
class Report:
    """All that is shown. Without content, a section is left out.

    ``speed``: for each run that has figures, what they are called and the figures. ``differences``: for each key that
    is not the same in all configurations, its values (None where it is missing).
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
    """Read the run folders ``paths``."""
    records = [read_run(path, recent=None) for path in dict.fromkeys(paths)]
    environment = observe(records)
    names = distinct_names([record.path for record in records])
    runs = [
        Run(name, _COLORS[i % len(_COLORS)], record, status(record, environment))
        for i, (name, record) in enumerate(zip(names, records, strict=True))
    ]
    speed = [(run, figures) for run in runs if (figures := _speed(run.record))]
    remarks = {
        "resume": "dotted: the run was started again and went on from there",
        "rollback": "dashed: the loss jumped and the run went back to there",
    }
    return Report(
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        runs=runs,
        charts=_charts(runs),
        remarks="; ".join(
            [text for kind, text in remarks.items() if any(run.record.of_kind(kind) for run in runs)]
            + [
                f"damaged lines were left out of {run.record.path / 'metrics.jsonl'}, the first is line {line}"
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
    """The last part of each path, or as much more of it as tells it from the others."""
    whole = [path.resolve().parts for path in paths]
    longest = max((len(parts) for parts in whole), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


# ---------------------------------------------------------------- curves

#: Title, key in a line of metrics, and whether on a logarithmic scale.
_CURVES = (
    ("learning rate", "lr", False),
    ("gradient norm", "grad_norm", True),
    ("samples/s", "samples_per_second", False),
    ("averaging α: distance from its start", "averaging_alpha", False),
    ("averaging β: distance from its start", "averaging_beta", False),
    ("averaging θ: distance from its start", "averaging_theta", False),
    ("averaging γ: distance from its start", "averaging_gamma", False),
)


def _charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each curve that any run has, with all runs in it."""
    metrics = {METRICS.get(str(run.record.setting("task.kind")), ("loss", min))[0] for run in runs}
    measured = sorted(metrics - {"loss"})
    if metrics != {"mse"}:  # it is the loss of a forecaster
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
#: What is measured, by its key in a line of metrics: what it is called, and its factor.
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
_SPEED_NAMES = [*(name for name, _ in _FIGURES.values()), *(f"{phase}, %" for phase in _PHASES), *_STARTS.values()]


def _speed(record: RunRecord) -> dict[str, str]:
    """The medians over the run, for the figures that it has."""
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
    """The keys that are not the same everywhere, with their value in each configuration; None where it is missing."""
    missing = object()
    found: dict[str, list[str | None]] = {}
    for key in sorted({key for each in flat for key in each}):
        values = [each.get(key, missing) for each in flat]
        if any(value != values[0] for value in values):
            found[key] = [None if v is missing else "null" if v is None else str(v) for v in values]
    return found


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train.epochs": 3, …}``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


# ---------------------------------------------------------------- files and jobs


def _pictures(run: Run) -> Iterable[Picture]:
    """Forecasts, confusion matrices and whatever else a run has drawn, but its curves: the report has its own."""
    for file in sorted(run.record.path.glob("*.png")):
        try:
            content = b"" if file.name == "curves.png" else file.read_bytes()
        except OSError:
            continue
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):  # a partial file
            continue
        if len(content) > _MOST_BYTES:
            size = f"{len(content) / 2**20:.0f} MiB"
            yield Picture(run, file, problem=f"{file} is too large to be shown here ({size})")
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
    """The files of these names that are not empty, with at most ``most`` lines."""
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
