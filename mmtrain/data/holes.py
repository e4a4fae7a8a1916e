"""Holes (NaN or infinite) in the values of one series, and the ways to fill them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
