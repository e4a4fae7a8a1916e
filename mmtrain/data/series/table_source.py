"""Forecasting windows over a table, with calendar features and known columns as covariates of the future."""

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
    """The known covariates of a table."""

    matrix: Floats  # (T, C_Z) calendar features, then the known columns, standardised by the training rows
    calendar: list[str]  # names of the calendar features
    columns: list[str]  # names of the known columns
    scaler: Scaler  # of the known columns
    steps: int  # T_Z, rows of ``matrix`` in a window

    @classmethod
    def fit(cls, table: SeriesTable, known: Sequence[str], calendar: bool, train_rows: int, steps: int) -> TableInputs:
        """Compute the covariates; ``train_rows`` is the number of rows that the scaler is fitted on.

        Raises:
            UserError: if ``calendar`` is true and the table has no times.
        """
        names = []
        if calendar:
            step = table.step
            if step is None:
                raise UserError(
                    f"{table.path}: data.calendar=true needs a time column; set data.time_column or data.calendar=false"
                )
            names = calendar_names(step)
        values = np.empty((len(table.values), 0)) if table.known is None else table.known
        scaler = fit_known(values[:train_rows])
        return cls(build_matrix(table, names, values, scaler), names, list(known), scaler, steps)

    @property
    def names(self) -> list[str]:
        return [*self.calendar, *self.columns]

    def batch(self, series: Int64s, stop: Int64s, variates: int) -> dict[str, Tensor]:
        """Return the covariates of a batch of windows; see :class:`~mmtrain.data.series.windows.Covariates`."""
        if not self.matrix.shape[1]:
            return {}
        return {"known": known_batch(runs(self.matrix, stop - self.steps, self.steps), variates)}

    def to_json(self) -> dict[str, Any]:
        return {"known": {"calendar": self.calendar, "columns": self.columns, "scaler": self.scaler.to_dict()}}


def fit_known(rows: NDArray[np.float64]) -> Scaler:
    """Fit the scaler of known columns to the training ``rows`` (T, K); flags (only 0 and 1) are not scaled."""
    if not rows.shape[1]:
        return Scaler(np.empty(0), np.empty(0))
    made = Scaler.fit(rows)
    flags = ((rows == 0) | (rows == 1)).all(axis=0)
    return Scaler(np.where(flags, 0, made.mean), np.where(flags, 1, made.std))


def build_matrix(table: SeriesTable, calendar: list[str], known: NDArray[np.float64], scaler: Scaler) -> Floats:
    """Return calendar features of the table's times, followed by the standardised columns ``known`` (T, K)."""
    scaled = scaler.transform(known)
    if not calendar:
        return np.ascontiguousarray(scaled)
    if table.stamps is None:
        raise UserError(f"{table.path}: calendar features need a time column; set data.time_column")
    features = calendar_features(table.stamps, calendar)
    return np.ascontiguousarray(np.concatenate([features, scaled], axis=1))


class SeriesWindows(Windows):
    """Windows within rows [start, stop) of standardised ``values`` (T, M). Window i begins at row start + i·stride.

    Every window that fits is used; none is dropped or padded.
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
            raise ValueError(f"rows {start} to {stop} are not within a table of {len(values)} rows")
        spans = Spans.of(np.array([start + lookback]), np.array([stop]), lookback, horizon, stride)
        if not spans.counts[0]:
            raise UserError(
                f"{stop - start} rows are too few for one window of lookback {lookback} + horizon {horizon} = "
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
    """Read a table, split it, standardise it by its training rows, and number its windows.

    Args:
        path, columns, missing, data_root, time_column, known, form: see :func:`~mmtrain.data.series.table.read_table`.
        split: a rule, its name, or three ratios. None: the split that the benchmarks use for this file name (etth for
            ETTh*, ettm for ETTm*, else 70/10/20 %).
        stride: time steps between the starts of training windows; 1 for validation and test.
        calendar: add calendar features to the known covariates.
        known_steps: T_Z, time steps of known covariates in a window; None: lookback + horizon.

    Raises:
        UserError: for a fault of the table, or a split that is too short for one window.
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
