"""Synthetic series that replace missing data sets in the data benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

STATES = ("CA", "TX", "WI")


def write_table(file: Path, rows: int, columns: int = 7) -> Path:
    """Write an hourly table of ``columns`` noisy daily waves."""
    hours = np.arange(rows)
    noise = np.random.default_rng(0).normal(scale=0.2, size=(rows, columns))
    values = np.sin(2 * np.pi * (hours[:, None] / 24 + np.arange(columns) / columns)) + noise
    frame = pd.DataFrame(values.astype(np.float32), columns=[f"c{column}" for column in range(columns)])
    frame.insert(0, "date", pd.date_range("2016-07-01", periods=rows, freq="h"))
    frame.to_parquet(file, index=False)
    return file


def write_m5(folder: Path, items: int, days: int) -> Path:
    """Write three files in the format of M5: ``items`` products, ``days`` days, and a calendar four weeks longer."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    dates = pd.date_range("2011-01-29", periods=days + 28, freq="D")
    weeks = np.arange(len(dates)) // 7
    calendar = pd.DataFrame({"date": dates.strftime("%Y-%m-%d"), "wm_yr_wk": 11101 + weeks})
    calendar["d"] = [f"d_{day + 1}" for day in range(len(dates))]
    calendar["event_type_1"] = np.where(random.random(len(dates)) < 0.1, "Sporting", None)
    calendar["event_type_2"] = None
    for state in STATES:
        calendar[f"snap_{state}"] = (random.random(len(dates)) < 0.3).astype(int)
    calendar.to_csv(folder / "calendar.csv", index=False)
    text = {
        "id": [f"item_{item}" for item in range(items)],
        "item_id": [f"item_{item}" for item in range(items)],
        "dept_id": [f"dept_{item % 7}" for item in range(items)],
        "cat_id": [f"cat_{item % 3}" for item in range(items)],
        "store_id": [f"store_{item % 10}" for item in range(items)],
        "state_id": [STATES[item % 3] for item in range(items)],
    }
    sales = random.poisson(2.0, size=(items, days)).astype(np.int16)
    sales[::4, :14] = 0  # not on sale yet
    sold = pd.DataFrame(sales, columns=[f"d_{day + 1}" for day in range(days)])
    pd.concat([pd.DataFrame(text), sold], axis=1).to_parquet(folder / "sales.parquet", index=False)
    prices = random.integers(100, 2000, size=(items, 1)) + np.zeros((1, int(weeks.max()) + 1), dtype=np.int32)
    prices[::4, :2] = 0  # not on sale yet
    priced = pd.DataFrame(prices.astype(np.int32), columns=[f"w{11101 + week}" for week in range(prices.shape[1])])
    priced.to_parquet(folder / "prices_cents_wide.parquet", index=False)
    return folder
