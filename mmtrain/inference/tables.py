"""The inputs of one forecast from the end of a table, for models with masks or inputs known in advance."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.split import Scaler
from mmtrain.data.series.table import SeriesTable
from mmtrain.data.series.table_source import build_matrix
from mmtrain.data.series.timeline import Timeline, step_of
from mmtrain.data.series.windows import known_batch
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def observed(past: NDArray[np.float32], masked: bool) -> dict[str, Tensor]:
    """``past`` (1, L, M) from standardised rows (L, M) and, if ``masked``, ``mask``; holes are 0."""
    import torch

    seen = np.isfinite(past)
    inputs = {"past": torch.from_numpy(np.where(seen, past, np.float32(0)))[None]}
    return {**inputs, "mask": torch.from_numpy(seen)[None]} if masked else inputs


def known_until(table: SeriesTable, saved: dict[str, Any], stop: int, steps: int, variates: int) -> Tensor:
    """(1, steps, M, C_Z): what is known of the rows that end before ``stop``, which may lie behind the table.

    Args:
        saved: the calendar features, columns and scaler that the model was trained with, as in its assets.

    Raises:
        UserError: for known columns that do not reach so far, or a table without times where they are needed.
    """
    scaler = Scaler.from_dict(saved["scaler"])
    rows = len(table.values) if table.known is None else len(table.known)
    if saved["columns"] and stop > rows:
        raise UserError(
            f"{table.path}: the model needs {', '.join(saved['columns'])} for the {stop - rows} step(s) behind the "
            "last row: add rows at the end with them and leave the other columns empty, or use --back"
        )
    known = np.empty((max(rows, stop), 0), np.float32) if table.known is None else table.known
    whole = replace(table, stamps=_go_on(table, len(known)))
    matrix = build_matrix(whole, list(saved["calendar"]), known, scaler)
    return known_batch(matrix[None, stop - steps : stop], variates)


def _go_on(table: SeriesTable, rows: int) -> NDArray[np.datetime64] | None:
    """The times of a table's rows, going on with its usual step to ``rows`` of them."""
    stamps = table.stamps
    if stamps is None or rows <= len(stamps):
        return stamps
    usual = step_of(stamps)
    if usual is None:
        return None
    more = Timeline(stamps[-1], usual).stamps(1, rows - len(stamps))
    return np.concatenate([stamps, more])
