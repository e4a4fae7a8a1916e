"""Forecasting windows over a table: a look-back and the horizon that follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.split import Scaler, Split, guess_split
from mmtrain.data.table import SeriesTable, read_table
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class SeriesWindows:
    """Source of {"past": float32 (B, L, M), "future": float32 (B, H, M)}.

    Window i begins at row ``start + i·stride`` and lies within rows [start, stop) of ``values`` (T, M): L =
    ``lookback`` rows, then H = ``horizon``. Every window that fits counts; none is dropped or padded.
    """

    def __init__(
        self, values: NDArray[np.float32], start: int, stop: int, lookback: int, horizon: int, stride: int = 1
    ) -> None:
        if min(lookback, horizon, stride) < 1:
            raise UserError(f"lookback={lookback}, horizon={horizon}, stride={stride}: each must be 1 or more")
        if not 0 <= start <= stop <= len(values):
            raise ValueError(f"rows {start} to {stop} of a table of {len(values)}")
        if stop - start < lookback + horizon:
            raise UserError(
                f"{stop - start} rows are too few for one window of look-back {lookback} + horizon {horizon} = "
                f"{lookback + horizon} rows; use a shorter model.lookback or model.horizon, or more rows"
            )
        self.values, self.start, self.stop = values, start, stop
        self.lookback, self.horizon, self.stride = lookback, horizon, stride
        self.block_sizes = [(stop - start - lookback - horizon) // stride + 1]

    def __len__(self) -> int:
        return self.block_sizes[0]

    @property
    def columns(self) -> int:
        return self.values.shape[1]

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of the first target of each window."""
        return self.start + np.asarray(indices, dtype=np.int64) * self.stride + self.lookback

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> dict[str, Tensor]:
        import torch

        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"windows are numbered 0 to {len(self) - 1}")
        # Gathering rows copies the batch once, in the layout it is wanted in; slices of windows would come transposed.
        first = self.rows(indices)[:, None]
        past = self.values[first + np.arange(-self.lookback, 0)]
        future = self.values[first + np.arange(self.horizon)]
        return {"past": torch.from_numpy(past), "future": torch.from_numpy(future)}


@dataclass(frozen=True)
class SeriesData:
    train: SeriesWindows
    val: SeriesWindows
    test: SeriesWindows
    scaler: Scaler
    table: SeriesTable
    split: Split


def load_series(
    path: str | Path,
    lookback: int,
    horizon: int,
    split: str | Sequence[float] | None = None,
    columns: Sequence[str] | None = None,
    missing: str = "error",
    data_root: str | Path | None = None,
    time_column: str | None = "date",
    stride: int = 1,
) -> SeriesData:
    """Read, split, standardise with the training rows, and cut into windows; ``stride`` is for training only.

    ``split`` None: the benchmark's for this file name (ETTh*, ETTm*: months; others 70/10/20 %).
    """
    table = read_table(path, time_column=time_column, columns=columns, missing=missing, data_root=data_root)
    cut = Split.of(guess_split(table.path.stem) if split is None else split, len(table.values))
    try:
        rows = {name: cut.rows(name, lookback, horizon) for name in ("train", "val", "test")}
    except UserError as error:
        raise UserError(f"{table.path}: {error}") from None
    scaler = Scaler.fit(table.values[: cut.borders[0]])
    values = scaler.transform(table.values)
    windows = {
        name: SeriesWindows(values, *rows[name], lookback, horizon, stride if name == "train" else 1) for name in rows
    }
    return SeriesData(windows["train"], windows["val"], windows["test"], scaler, table, cut)
