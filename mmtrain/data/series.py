"""Forecasting windows over a table: a look-back and the horizon that follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.borders import SplitRule
from mmtrain.data.split import Scaler, Split, guess_split
from mmtrain.data.table import SeriesTable, read_table
from mmtrain.data.table_inputs import TableInputs
from mmtrain.data.timeline import Stamps
from mmtrain.data.windows import hide_holes, known_batch, runs
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class SeriesWindows:
    """Source of {"past": float32 (B, L, M), "future": float32 (B, H, M)}.

    Window i begins at row ``start + i·stride`` and lies within rows [start, stop) of ``values`` (T, M): L =
    ``lookback`` rows, then H = ``horizon``. Every window that fits counts; none is dropped or padded.

    With ``inputs`` also "known" (B, T_Z, M, C_Z); with ``masked`` "mask" (B, L, M) and "future_mask" (B, H, M), True
    where a value was observed, and 0 in the place of holes.
    """

    def __init__(
        self,
        values: NDArray[np.float32],
        start: int,
        stop: int,
        lookback: int,
        horizon: int,
        stride: int = 1,
        *,
        inputs: TableInputs | None = None,
        masked: bool = False,
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
        self.values, self.start, self.stop = np.ascontiguousarray(values), start, stop
        self.inputs, self.masked = inputs, masked
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
        first = self.rows(indices)
        past = runs(self.values, first - self.lookback, self.lookback)
        future = runs(self.values, first, self.horizon)
        batch = hide_holes(past, future) if self.masked else {}
        batch |= {"past": torch.from_numpy(past), "future": torch.from_numpy(future)}
        if self.inputs is not None and self.inputs.width:
            batch["known"] = known_batch(self.inputs.before(first + self.horizon), self.columns)
        return batch


@dataclass(frozen=True)
class SeriesData:
    train: SeriesWindows
    val: SeriesWindows
    test: SeriesWindows
    scaler: Scaler
    table: SeriesTable
    split: Split
    inputs: TableInputs

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def columns(self) -> list[str]:
        return list(self.table.columns)

    def scaler_of(self, source: SeriesWindows, index: int) -> Scaler:
        """That of window ``index``: of a table, the same for all."""
        return self.scaler

    def stamps_of(self, source: SeriesWindows, index: int) -> Stamps | None:
        """(L + H,) times of window ``index``, or None for a table without times."""
        if self.table.stamps is None:
            return None
        first = int(source.rows(np.array([index]))[0])
        return self.table.stamps[first - source.lookback : first + source.horizon]

    def rows_of(self, source: SeriesWindows, index: int) -> NDArray[np.int64]:
        """(L + H,) numbers of the rows of window ``index``."""
        first = int(source.rows(np.array([index]))[0])
        return np.arange(first - source.lookback, first + source.horizon)

    def labels_of(self, source: SeriesWindows, index: int) -> list[str]:
        """What the variates of window ``index`` are called."""
        return self.columns

    def assets(self) -> dict[str, Any]:
        """What prediction needs, as JSON values."""
        return {"scaler": self.scaler.to_dict(), **self.inputs.to_json()}


def load_series(
    path: str | Path,
    lookback: int,
    horizon: int,
    split: str | Sequence[float] | SplitRule | None = None,
    columns: Sequence[str] | None = None,
    missing: str = "error",
    data_root: str | Path | None = None,
    time_column: str | None = "date",
    stride: int = 1,
    known: Sequence[str] = (),
    calendar: bool = False,
    known_steps: int | None = None,
) -> SeriesData:
    """Read, split, standardise with the training rows, and cut into windows; ``stride`` is for training only.

    ``split`` None: the benchmark's for this file name (ETTh*, ETTm*: months; others 70/10/20 %). ``known``: columns
    known in advance; ``calendar``: what the dates say; ``known_steps``: T_Z (None: look-back + horizon).
    """
    table = read_table(
        path, time_column=time_column, columns=columns, missing=missing, data_root=data_root, known=known
    )
    length = len(table.values)
    try:
        if isinstance(split, SplitRule):
            stamps = None if table.stamps is None else table.stamps[:length]
            cut = split.cut_table(length, stamps, table.path)
        else:
            cut = Split.of(guess_split(table.path.stem) if split is None else split, length)
    except UserError as error:
        raise UserError(str(error) if str(table.path) in str(error) else f"{table.path}: {error}") from None
    try:
        rows = {name: cut.rows(name, lookback, horizon) for name in ("train", "val", "test")}
    except UserError as error:
        raise UserError(f"{table.path}: {error}") from None
    scaler = Scaler.fit(table.values[: cut.borders[0]])
    values = scaler.transform(table.values)
    inputs = TableInputs.fit(table, known, calendar, cut.borders[0], known_steps or lookback + horizon)
    windows = {
        name: SeriesWindows(
            values,
            *rows[name],
            lookback,
            horizon,
            stride if name == "train" else 1,
            inputs=inputs,
            masked=missing == "mask",
        )
        for name in rows
    }
    return SeriesData(windows["train"], windows["val"], windows["test"], scaler, table, cut, inputs)
