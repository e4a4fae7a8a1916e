"""Forecasting windows over a table, with calendar features and known columns as its future covariates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.core.fingerprint import Fingerprint, digest
from mmtrain.data.series.files import TableFormat
from mmtrain.data.series.panel_inputs import calendar_features, calendar_names
from mmtrain.data.series.split import Scaler, Split, SplitRule, guess_split
from mmtrain.data.series.table import SeriesTable, read_table
from mmtrain.data.series.windows import (
    Floats,
    ForecastingData,
    Int64s,
    Spans,
    WindowOrigin,
    Windows,
    known_batch,
    runs,
)
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


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
        names = []
        if calendar:
            step = table.step
            if step is None:
                raise UserError(
                    f"{table.path}: data.calendar=true needs a time column: set data.time_column, or leave it out"
                )
            names = calendar_names(step)
        beside = np.empty((len(table.values), 0)) if table.known is None else table.known
        scaler = fit_known(beside[:train_rows])
        return cls(build_matrix(table, names, beside, scaler), names, list(known), scaler, steps)

    @property
    def names(self) -> list[str]:
        return [*self.calendar, *self.columns]

    def batch(self, series: Int64s, stop: Int64s, variates: int) -> dict[str, Tensor]:
        """See :class:`~mmtrain.data.series.windows.Covariates`."""
        if not self.matrix.shape[1]:
            return {}
        return {"known": known_batch(runs(self.matrix, stop - self.steps, self.steps), variates)}

    def to_json(self) -> dict[str, Any]:
        return {"known": {"calendar": self.calendar, "columns": self.columns, "scaler": self.scaler.to_dict()}}


def fit_known(rows: NDArray[np.float64]) -> Scaler:
    """Standardisation of known columns by the training ``rows`` (T, K); flags, of 0 and 1 only, stay as they are."""
    if not rows.shape[1]:
        return Scaler(np.empty(0), np.empty(0))
    made = Scaler.fit(rows)
    flags = ((rows == 0) | (rows == 1)).all(axis=0)
    return Scaler(np.where(flags, 0, made.mean), np.where(flags, 1, made.std))


def build_matrix(table: SeriesTable, calendar: list[str], known: NDArray[np.float64], scaler: Scaler) -> Floats:
    """Calendar features of the table's times beside the standardised ``known`` (T, K)."""
    scaled = scaler.transform(known)
    if not calendar:
        return np.ascontiguousarray(scaled)
    if table.stamps is None:
        raise UserError(f"{table.path}: calendar features need a time column: set data.time_column")
    features = calendar_features(table.stamps, calendar)
    return np.ascontiguousarray(np.concatenate([features, scaled], axis=1))


class SeriesWindows(Windows):
    """Windows within the rows [start, stop) of ``values`` (T, M), standardised; window i begins at start + i·stride.

    Every window that fits counts; none is dropped or padded.
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
        if not 0 <= start <= stop <= len(values):
            raise ValueError(f"rows {start} to {stop} of a table of {len(values)}")
        spans = Spans.of(np.array([start + lookback]), np.array([stop]), lookback, horizon, stride)
        if not spans.counts[0]:
            raise UserError(
                f"{stop - start} rows are too few for one window of look-back {lookback} + horizon {horizon} = "
                f"{lookback + horizon} rows; use a shorter model.lookback or model.horizon, or more rows"
            )
        super().__init__(spans, lookback, horizon, inputs, masked=masked)
        self.values, self.stop = np.ascontiguousarray(values), stop

    def read(self, series: Int64s, start: Int64s, length: int) -> Floats:
        return runs(self.values, start, length)


@dataclass(frozen=True)
class SeriesData(ForecastingData):
    """The windows of a table."""

    scaler: Scaler
    table: SeriesTable
    split: Split
    inputs: TableInputs

    def _origin(self, series: int, rows: Int64s) -> WindowOrigin:
        stamps = None if self.table.stamps is None else self.table.stamps[rows]
        return WindowOrigin(self.columns, self.scaler, rows, stamps)

    def fingerprint(self) -> Fingerprint:
        rows = self.split.borders[0]
        return {
            "columns": self.columns,
            "known": self.known,
            "rows": rows,
            "values": digest(self.table.values[:rows]),
            "inputs": digest(self.inputs.matrix[:rows]),
        }

    def assets(self) -> dict[str, Any]:
        step = self.table.step
        return {"scaler": self.scaler.to_dict(), "step": step and str(step), **self.inputs.to_json()}


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
    form: TableFormat | None = None,
) -> SeriesData:
    """Read, split, standardise with the training rows, and cut into windows; ``stride`` is for training only.

    ``split`` None: the benchmark's for this file name (ETTh*, ETTm*: months; others 70/10/20 %). ``known``: columns
    known in advance; ``calendar``: add calendar features; ``known_steps``: T_Z (None: look-back + horizon).
    ``form``: how the file is written.
    """
    table = read_table(
        path, time_column=time_column, columns=columns, missing=missing, data_root=data_root, known=known, form=form
    )
    length = len(table.values)
    rule = guess_split(table.path.stem) if split is None else split
    if not isinstance(rule, SplitRule):
        rule = SplitRule(rule) if isinstance(rule, str) else SplitRule("ratio", parts=tuple(rule))
    try:
        cut = rule.cut_table(length, None if table.stamps is None else table.stamps[:length], table.path, table.zone)
        rows = {name: cut.rows(name, lookback, horizon) for name in ("train", "val", "test")}
    except UserError as error:
        raise UserError(str(error) if str(table.path) in str(error) else f"{table.path}: {error}") from None
    scaler = Scaler.fit(table.values[: cut.borders[0]])
    values = scaler.transform(table.values)
    inputs = TableInputs.fit(table, known, calendar, cut.borders[0], known_steps or lookback + horizon)

    def windows(name: str, stride: int = 1) -> SeriesWindows:
        return SeriesWindows(values, *rows[name], lookback, horizon, stride, inputs=inputs, masked=missing == "mask")

    return SeriesData(
        train=windows("train", stride),
        val=windows("val"),
        test=windows("test"),
        path=table.path,
        columns=list(table.columns),
        known=inputs.names,
        static={},
        scaler=scaler,
        table=table,
        split=cut,
        inputs=inputs,
    )
