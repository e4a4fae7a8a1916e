"""Holes (NaN or infinite) in the values of one series, and the ways to fill them.

What windows of tables and of panels have in common: gathering rows, holes, and inputs beside the past.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

FILLS = ("ffill", "interpolate", "zero")


def fill_column(column: NDArray[np.float32], bad: NDArray[np.bool_], fill: str) -> bool:
    """Fill the ``bad`` rows of ``column`` (T,) in place; False where the way of filling cannot.

    ``ffill`` repeats the last value before (it never looks ahead, and so cannot fill the first row), ``interpolate`` is
    linear and takes the nearest at the ends, ``zero`` is 0. There must be a row that is not bad, but for ``zero``.
    """
    rows = np.arange(len(column))
    good = rows[~bad]
    if fill == "zero":
        column[bad] = 0
    elif not len(good):
        return False
    elif fill == "interpolate":
        column[bad] = np.interp(rows[bad], good, column[good])
    elif bad[0]:
        return False
    else:
        column[bad] = column[good[np.searchsorted(good, rows[bad]) - 1]]
    return True


Floats = NDArray[np.float32]
Int64s = NDArray[np.int64]


def runs(values: NDArray[np.float32], first: Int64s, length: int) -> Floats:
    """Rows [f, f + length) of ``values`` (T, C), contiguous, for each f of ``first`` (n,): a copy (n, length, C).

    Every run must lie within the rows; this is not checked. One block of memory is copied for each run, which is more
    than ten times as fast as gathering row by row.
    """
    if not length or not len(first):
        return np.empty((len(first), length, values.shape[1]), dtype=values.dtype)
    row, item = values.strides
    assert row == item * values.shape[1], "rows must lie one after the other"
    shape = (len(values) - length + 1, length * values.shape[1])
    view = np.lib.stride_tricks.as_strided(values, shape, (row, item), writeable=False)
    return view[first].reshape(len(first), length, values.shape[1])


def known_batch(known: Floats, variates: int) -> Tensor:
    """(B, T_Z, C_Z) → (B, T_Z, M, C_Z), the same for each variate and held once."""
    import torch

    b, steps, width = known.shape
    return torch.from_numpy(known).unsqueeze(2).expand(b, steps, variates, width)


def hide_holes(past: Floats, future: Floats) -> dict[str, Tensor]:
    """``mask`` (B, L, M) and ``future_mask`` (B, H, M): True where a value was observed; holes become 0 in place."""
    import torch

    masks = {}
    for name, values in (("mask", past), ("future_mask", future)):
        seen = np.isfinite(values)
        if not seen.all():
            values[~seen] = 0
        masks[name] = torch.from_numpy(seen)
    return masks
