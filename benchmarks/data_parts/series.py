"""Forecasting data: windows per second, the loader's share of a step, and a panel of 30,490 series.

Synthetic series of the same size replace ETTh1 and M5 if these are not given.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from trainer_parts.figure import Figure, median_of
from trainer_parts.overhead import BareLoop

from data_parts.made import write_m5, write_table
from mmtrain.config import load_config
from mmtrain.data.core.loader import train_batches
from mmtrain.data.series.panel_inputs import calendar_features
from mmtrain.data.series.table_source import SeriesData, SeriesWindows, load_series
from mmtrain.models.stochastic import sample_keys
from mmtrain.parallel.ranks import keep_freed_memory
from mmtrain.tasks import Batch, StepKey, build_task

PART = "series"


class _SlicedWindows(Dataset):
    """Windows as in the Time-Series-Library: one at a time, as slices of an array of values and one of time marks."""

    def __init__(self, series: SeriesData, lookback: int, horizon: int, label: int, dtype: type) -> None:
        train = series.train
        assert isinstance(train, SeriesWindows)
        assert series.table.stamps is not None
        names = ["hour", "weekday", "day", "yearday"]
        self.values = train.values[: train.stop].astype(dtype)
        self.marks = calendar_features(series.table.stamps[: train.stop], names).astype(dtype)
        self.lookback, self.horizon, self.label = lookback, horizon, label

    def __len__(self) -> int:
        return len(self.values) - self.lookback - self.horizon + 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        end = index + self.lookback
        begin = end - self.label
        stop = begin + self.label + self.horizon
        return self.values[index:end], self.values[begin:stop], self.marks[index:end], self.marks[begin:stop]


def windows(table: Path, split: str | None, *, pairs: int, batches: int) -> Iterator[Figure]:
    """Compare mmtrain's training loader with slicing, in one process, in alternating blocks of ``batches`` batches.

    The library's arrays are float64, and its training loop casts each batch to float32. A second comparison uses
    float32 arrays. Both run with the allocator settings of a training process, which keep freed memory, since new pages
    cost time.
    """
    keep_freed_memory()
    lookback, horizon, size = 512, 96, 64
    for calendar in (True, False):
        series = load_series(table, lookback, horizon, split=split, calendar=calendar)
        for dtype in (np.float64, np.float32):
            dataset = _SlicedWindows(series, lookback, horizon, 48, dtype)
            sliced = DataLoader(dataset, size, shuffle=True, drop_last=True)
            ours = train_batches(series.train, seed=0, batch_size=size, start=0, steps=1 << 40)
            repeated = _forever(sliced)
            speeds: list[tuple[float, float]] = []
            for _ in range(pairs + 1):
                speeds.append((_speed(ours, batches, size), _speed(repeated, batches, size)))
            ratios = [a / b for a, b in speeds[1:]]  # the first pair is a warm-up
            medians = [float(np.median([pair[loader] for pair in speeds[1:]])) for loader in (0, 1)]
            content = "with calendar features" if calendar else "past and future only"
            kind = np.dtype(dtype).name
            yield Figure(
                PART,
                f"windows/s of the loader, {content}: ours / sliced one at a time with time marks, {kind}",
                **median_of(ratios),
                unit="x",
                target=5.0 if dtype is np.float64 else None,
                at_least=True,
                how=f"{table.stem}, L = {lookback}, H = {horizon}, batch {size}, {len(series.columns)} columns,"
                f" no workers, median of {pairs} pairs of {batches} batches:"
                f" {medians[0]:,.0f} and {medians[1]:,.0f} windows/s",
                detail={"ours": [a for a, _ in speeds], "sliced": [b for _, b in speeds]},
            )


def _forever(loader: DataLoader) -> Iterator[Any]:
    while True:
        for batch in loader:
            yield [part.float() for part in batch]


def _speed(batches: Iterator[Any], count: int, size: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * size / (time.perf_counter() - begin)


def loader_share(table: Path, split: str, *, steps: int, tiny: bool) -> Iterator[Figure]:
    """Yield the time in the loader as a share of a training step of configs/tsm2_etth1.yaml, in one process."""
    small = ["model.dim=8", "model.depth=1", "train.batch_size=4"] if tiny else []
    config = load_config("tsm2_etth1", [f"data.path={table}", f"data.split={split}", *small])
    task = build_task(config)
    size = config.train.batch_size
    stream = _Timed(train_batches(task.train, seed=config.seed, batch_size=size, start=0, steps=1 << 40))

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with sample_keys(batch["key"]):
            return task.loss(model, batch, StepKey(config.seed, 0))

    loop = BareLoop(config, stream, loss)
    loop.run(2)
    stream.times.clear()
    shares, wholes = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        loop.run(1)
        wholes.append(time.perf_counter() - begin)
        shares.append(100 * stream.times[-1] / wholes[-1])
    yield Figure(
        PART,
        "the loader's share of a training step of tsm2_etth1",
        **median_of(shares),
        unit="%",
        target=3.0,
        how=f"median of {steps} steps of {size} windows, one process, no workers, {torch.get_num_threads()} thread(s): "
        f"{1e3 * float(np.median(stream.times)):.3f} of {1e3 * float(np.median(wholes)):.0f} ms",
        detail={"loader": stream.times, "step": wholes},
    )


class _Timed:
    """Iterator that records the time of each item."""

    def __init__(self, items: Iterator[Batch]) -> None:
        self.items, self.times = items, list[float]()

    def __iter__(self) -> _Timed:
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        item = next(self.items)
        self.times.append(time.perf_counter() - begin)
        return item


def panel(root: Path, out: Path, *, tiny: bool) -> Iterator[Figure]:
    """Prepare M5 from its parquet files and open it, each in a fresh process. Yields times and peak memory."""
    made = _fresh(_PREPARE, str(root), str(out))
    opened = _fresh(_OPEN, str(out), "8" if tiny else "112", "4" if tiny else "28")
    what = f"{made['series']:,} series × up to {made['longest']:,} days"
    yield Figure(
        PART,
        "a panel from parquet, prepared and ready to train",
        made["seconds"] + opened["seconds"],
        "s",
        target=20.0,
        how=f"{what}, prices, events and statics too: prepared in {made['seconds']:.1f} s, opened and its "
        f"{opened['windows']:,} windows numbered in {opened['seconds']:.2f} s",
        detail={"prepare": made, "open": opened},
    )
    yield Figure(
        PART,
        "growth of the peak of resident memory while preparing",
        made["grown"],
        "MiB",
        target=500.0,
        how=f"{what}, a fresh process, from {made['before']:.0f} MiB after the imports",
    )
    yield Figure(
        PART,
        "opening a prepared panel and numbering its windows",
        opened["seconds"],
        "s",
        target=0.5,
        how=f"{opened['windows']:,} windows of {opened['series']:,} series, a fresh process, pages in the cache",
    )
    yield Figure(
        PART,
        "growth of the peak of resident memory on opening a panel, and after 200 batches",
        opened["grown"],
        "MiB",
        target=500.0,
        how=f"{opened['opened']:.0f} MiB of it on opening; {opened['speed']:,.0f} windows/s in batches of 256",
    )


_MEMORY = """
import json, resource, sys, time
def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
def peak():  # not ru_maxrss, which a process inherits from its parent
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
"""
_PREPARE = (
    _MEMORY
    + """
import pandas, pyarrow.csv, pyarrow.parquet
from mmtrain.data.prepare.m5 import prepare_m5
before, begin = now(), time.perf_counter()
done = prepare_m5(sys.argv[1], sys.argv[2])
counts = done.meta["counts"]
print(json.dumps({"seconds": time.perf_counter() - begin, "before": before, "grown": peak() - before,
                  "series": counts["series"], "longest": counts["longest"]}))
"""
)
_OPEN = (
    _MEMORY
    + """
import torch
from mmtrain.config import PanelDataConfig
from mmtrain.data.core.loader import train_batches
from mmtrain.data.series.panel_source import load_panel
before, begin = now(), time.perf_counter()
config = PanelDataConfig(path=sys.argv[1], known=["price", "snap"], calendar=True, static=["dept_id", "store_id"])
data = load_panel(config, int(sys.argv[2]), int(sys.argv[3]))
seconds, opened = time.perf_counter() - begin, now() - before
stream = train_batches(data.train, seed=0, batch_size=256, start=0, steps=201, window=64)
next(stream)
begin = time.perf_counter()
for batch in stream:
    pass
speed = 200 * 256 / (time.perf_counter() - begin)
print(json.dumps({"seconds": seconds, "opened": opened, "grown": peak() - before, "windows": len(data.train),
                  "series": len(data.panel), "speed": speed}))
"""
)


def _fresh(code: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def parts(
    folder: Path, *, tiny: bool, data: Path | None = None, m5: Path | None = None, pairs: int = 20, steps: int = 20
) -> dict[str, Callable[[], Iterator[Figure]]]:
    """Return the measurements by name. Each one starts when it is called, and writes to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    there = data is not None and not tiny and (data / "ETTh1.parquet").is_file()

    def table() -> tuple[Path, str]:
        if there and data is not None:
            return data / "ETTh1.parquet", "etth"
        return write_table(folder / "made_hours.parquet", 3200 if tiny else 14400), "ratio" if tiny else "etth"

    def measure_windows() -> Iterator[Figure]:
        file, split = table()
        named = None if split == "ratio" else split
        return windows(file, named, pairs=2 if tiny else pairs, batches=3 if tiny else 50)

    def measure_share() -> Iterator[Figure]:
        return loader_share(*table(), steps=2 if tiny else steps, tiny=tiny)

    def measure_panel() -> Iterator[Figure]:
        root = m5
        if root is None or tiny:
            root = write_m5(folder / "made_m5", *((30, 120) if tiny else (30490, 1941)))
        return panel(root, folder / "panel", tiny=tiny)

    return {"windows": measure_windows, "share": measure_share, "panel": measure_panel}
