"""One measured figure beside its target, and the machine it was measured on."""

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
    """``target``: what ``value`` must be at most, or at least with ``at_least``; None for what only informs.

    ``spread``: the lower and the upper quartile, where there are several readings. ``how``: what was measured.
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
    """``value`` and ``spread`` of a figure from several readings."""
    if len(values) < 2:
        return {"value": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"value": middle, "spread": (low, high)}


def machine() -> dict[str, Any]:
    """Model of the CPU, cores, load before the measurement, and versions."""
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
    """One line, for the log."""
    spread = f" (quartiles {figure.spread[0]:.3f} to {figure.spread[1]:.3f})" if figure.spread else ""
    return f"{figure.name}: {figure.value:.3f} {figure.unit}{spread}; {figure.how}"


def table_of(figures: Sequence[Figure], title: str) -> Table:
    """All of them, beside their targets."""
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
    """Measure those of ``parts(folder)`` that ``--only`` names, tell each figure, and all beside their targets.

    ``given`` has ``only`` and ``json``; the folder is a temporary one, below ``within``.
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
