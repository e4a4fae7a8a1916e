"""Measured figures with their targets, and a description of the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        part: Part of the benchmark.
        name: Name of the figure.
        value: Measured value.
        unit: Unit of the value.
        how: Description of the measurement.
        target: Largest allowed value (with ``at_least`` the smallest), or None if there is no target.
        at_least: Whether the target is a lower bound.
        spread: Lower and upper quartile of several measurements, or None.
        detail: All measurements.
    """

    part: str
    name: str
    value: float
    unit: str
    how: str
    target: float | None = None
    at_least: bool = False
    spread: tuple[float, float] | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def median_of(values: Sequence[float]) -> dict[str, Any]:
    """Return ``value`` and ``spread`` of a figure from several measurements."""
    if len(values) < 2:
        return {"value": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"value": middle, "spread": (low, high)}


def machine() -> dict[str, Any]:
    """Return the CPU model, the number of cores, the load before the measurement, and versions."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def line_of(figure: Figure) -> str:
    """Return the figure as one line for the log."""
    spread = f" (quartiles {figure.spread[0]:.3f} to {figure.spread[1]:.3f})" if figure.spread else ""
    return f"{figure.name}: {figure.value:.3f} {figure.unit}{spread}; {figure.how}"


def table_of(figures: Sequence[Figure], title: str) -> Table:
    """Return a table of all figures with their targets."""
    table = Table(title=title)
    for name in ("part", "figure", "measured", "target", "met", "how"):
        table.add_column(name, justify="right" if name in ("measured", "target") else "left", overflow="fold")
    for f in figures:
        target = "" if f.target is None else f"{'≥' if f.at_least else '≤'} {f.target:g} {f.unit}"
        met = {None: "", True: "yes", False: "NO"}[f.met]
        table.add_row(f.part, f.name, f"{f.value:.3f} {f.unit}", target, met, f.how)
    return table


def measure_parts(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    parts: Callable[[Path], dict[str, Callable[[], Iterator[Figure]]]],
    title: str,
    within: Path | None = None,
) -> None:
    """Run the measurements that ``--only`` names, and print each figure and a table of all with their targets.

    Args:
        parser: Reports an unknown name in ``--only``.
        given: Arguments with the attributes ``only`` and ``json``.
        parts: Returns the measurements by name for a temporary folder.
        title: Title of the table.
        within: Parent of the temporary folder.
    """
    here = machine()
    print("  ".join(f"{key}={value}" for key, value in here.items() if value is not None), flush=True)
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=within) as folder:
        known = parts(Path(folder))
        chosen = given.only.split(",") if given.only else list(known)
        if unknown := set(chosen) - set(known):
            parser.error(f"--only {','.join(sorted(unknown))}: choose from {', '.join(known)}")
        for name in chosen:
            for figure in known[name]():
                found.append(figure)
                print(line_of(figure), flush=True)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table_of(found, title))
    if given.json:
        given.json.write_text(json.dumps({"machine": here, "figures": [f.to_json() for f in found]}, indent=1) + "\n")
