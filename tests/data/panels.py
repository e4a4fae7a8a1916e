"""Small panels for tests: series of unequal length with what is known of them, on disk and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd

from mmtrain.config import PanelDataConfig
from mmtrain.data.prepare.output import Prepared
from mmtrain.data.prepare.panel import prepare_panel
from mmtrain.data.prepare.panel_writer import PanelWriter
from mmtrain.data.series.panel_source import PanelData, load_panel
from mmtrain.data.series.split import SplitRule

LAST = SplitRule("last", last=(4, 4))


def long_frame(lengths: list[int], ahead: int = 0, freq: str = "D") -> pd.DataFrame:
    """Columns id, date, y, price, kind, size; series i begins i days later. y is 1000·i + row, price the row plus i."""
    parts = []
    for number, length in enumerate(lengths):
        rows = np.arange(length + ahead)
        y = np.where(rows < length, 1000.0 * number + rows, np.nan)
        dates = pd.date_range("2024-01-01", periods=number + len(rows), freq=freq)[number:]
        about = {"kind": "ab"[number % 2], "size": 1.5 * number}
        parts.append(pd.DataFrame({"id": f"s{number}", "date": dates, "y": y, "price": rows + 1.0 * number, **about}))
    return pd.concat(parts, ignore_index=True)


def write(frame: pd.DataFrame, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_parquet(file, index=False)
    return file


def prepared(folder: Path, lengths: list[int], split: SplitRule = LAST, ahead: int = 0, **options: Any) -> Prepared:
    file = write(long_frame(lengths, ahead), folder / "long.parquet")
    chosen = {"known": ["price"], "static": ["kind", "size"], **options}
    return prepare_panel(file, folder / "panel", split=split, force=True, **chosen)


def opened(folder: Path, lookback: int = 6, horizon: int = 3, steps: int = 0, **keys: Any) -> PanelData:
    return load_panel(PanelDataConfig(path=str(folder), **keys), lookback, horizon, steps)


def in_shards(folder: Path, lengths: list[int], shard_rows: int = 1 << 20, **keys: Any) -> PanelData:
    """Prepared in shards of about so many rows, and opened."""
    sound = PanelWriter.__init__

    def small(self: PanelWriter, *args: Any, **options: Any) -> None:
        sound(self, *args, **{**options, "shard_bytes": 8 * shard_rows})

    with mock.patch.object(PanelWriter, "__init__", small):
        prepared(folder, lengths)
    return opened(folder / "panel", **keys)
