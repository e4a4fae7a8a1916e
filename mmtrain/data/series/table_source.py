"""What is known in advance of the rows of a table: calendar features and known columns, as one matrix.

Forecasting windows over a table: a look-back and the horizon that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.split import Scaler, Split, SplitRule, guess_split
from mmtrain.data.series.table import SeriesTable, read_table
from mmtrain.data.series.timeline import Stamps, calendar_features, calendar_names, step_of
from mmtrain.data.series.windows import hide_holes, known_batch, runs
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TableInputs:
    """``matrix`` (T, C_Z): calendar features, then the known columns, standardised by the training rows.

    ``steps``: T_Z, how many rows of it a window has.
    """

    matrix: Floats
    calendar: list[str]
    columns: list[str]
    scaler: Scaler
    steps: int

    @classmethod
    def fit(cls, table: SeriesTable, known: Sequence[str], calendar: bool, train_rows: int, steps: int) -> TableInputs:
        """Raises UserError for calendar features of a table without times."""
        names = _calendar_of(table) if calendar else []
        beside = np.empty((len(table.values), 0), np.float32) if table.known is None else table.known
        scaler = fit_known(beside[:train_rows])
        return cls(build_matrix(table, names, beside, scaler), names, list(known), scaler, steps)

    @property
    def width(self) -> int:
        """C_Z."""
        return self.matrix.shape[1]

    @property
    def names(self) -> list[str]:
        return [*self.calendar, *self.columns]

    def before(self, stop: NDArray[np.int64]) -> Floats:
        """(B, T_Z, C_Z): the ``steps`` rows that end before row ``stop`` (B,)."""
        return runs(self.matrix, stop - self.steps, self.steps)

    def to_json(self) -> dict[str, Any]:
        return {"known": {"calendar": self.calendar, "columns": self.columns, "scaler": self.scaler.to_dict()}}


def fit_known(rows: Floats) -> Scaler:
    """Standardisation of known columns by the training ``rows`` (T, K); flags, of 0 and 1 only, stay as they are."""
    if not rows.shape[1]:
        return Scaler(np.empty(0, np.float32), np.empty(0, np.float32))
    made = Scaler.fit(rows)
    flags = ((rows == 0) | (rows == 1)).all(axis=0)
    return Scaler(np.where(flags, 0, made.mean).astype(np.float32), np.where(flags, 1, made.std).astype(np.float32))


def build_matrix(table: SeriesTable, calendar: list[str], known: Floats, scaler: Scaler) -> Floats:
    """Calendar features of the table's times beside the standardised ``known`` (T, K)."""
    scaled = scaler.transform(known)
    if not calendar:
        return np.ascontiguousarray(scaled)
    if table.stamps is None:
        raise UserError(f"{table.path}: calendar features need a time column: set data.time_column")
    features = calendar_features(table.stamps, calendar)
    return np.ascontiguousarray(np.concatenate([features, scaled], axis=1))


def _calendar_of(table: SeriesTable) -> list[str]:
    step = None if table.stamps is None else step_of(table.stamps)
    if step is None:
        raise UserError(f"{table.path}: data.calendar=true needs a time column: set data.time_column, or leave it out")
    return calendar_names(step)


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
