"""What is known in advance of the rows of a table: calendar features and known columns, as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.calendar import calendar_features, calendar_names
from mmtrain.data.split import Scaler
from mmtrain.data.table import SeriesTable
from mmtrain.data.timeline import step_of
from mmtrain.data.windows import runs
from mmtrain.errors import UserError

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
