"""Sort the rows of a table by time, handle repeated times, and measure how regular the time steps are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.files import DUPLICATES, place
from mmtrain.data.series.timeline import to_local
from mmtrain.data.series.times import has_frequency
from mmtrain.errors import UserError, nearest
from mmtrain.log import logger

if TYPE_CHECKING:
    import pandas as pd

Stamps = NDArray[np.datetime64]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Regularity:
    """Result of :func:`regularity`. Time steps of months or business days count as regular."""

    duplicates: int  # rows whose time also occurs in an earlier row
    irregular: int  # time steps between distinct times that differ from ``step``
    backward: int  # rows with an earlier time than the row before them
    step: pd.Timedelta | None  # the most common time step; None for fewer than two distinct times


def regularity(stamps: Stamps, zone: str | None = None) -> Regularity:
    """Measure how regular the times (T,) are, in any order of the rows.

    Args:
        zone: the time zone of the table; the times are in UTC then. Steps that are regular in local time, such as days
            of 23 or 25 hours, count as regular.
    """
    found = _regularity(stamps)
    if zone is None or not found.irregular:
        return found
    return replace(found, irregular=min(found.irregular, _regularity(to_local(stamps, zone)).irregular))


def _regularity(stamps: Stamps) -> Regularity:
    import pandas as pd

    us = stamps.astype("datetime64[us]").astype(np.int64)
    steps = np.diff(us)
    if len(steps) and steps[0] > 0 and (steps == steps[0]).all():
        return Regularity(0, 0, 0, pd.Timedelta(int(steps[0]), unit="us"))
    times = np.unique(us)
    backward = int((steps < 0).sum())
    if len(times) < 2:
        return Regularity(len(us) - len(times), 0, backward, None)
    known, counts = np.unique(np.diff(times), return_counts=True)
    usual = int(known[np.argmax(counts)])
    regular = len(known) == 1 or has_frequency(times.astype("datetime64[us]"))
    irregular = 0 if regular else int(counts.sum() - counts.max())
    return Regularity(len(us) - len(times), irregular, backward, pd.Timedelta(usual, unit="us"))


@dataclass(frozen=True)
class Order:
    """An order of the rows of a table, in which groups of rows may be merged into one."""

    rows: Int64s  # (n,) the row of the table at each position
    starts: Int64s | None = None  # positions in ``rows`` at which each group begins; None: no rows are merged

    @property
    def first(self) -> Int64s:
        """For each row of the result, one of the table's rows that it is computed from."""
        return self.rows if self.starts is None else self.rows[self.starts]

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Put ``values`` (n, M) into this order; merged rows become the mean of their finite values."""
        sorted_values = values[self.rows]
        if self.starts is None:
            return sorted_values
        seen = np.isfinite(sorted_values)
        sums = np.add.reduceat(np.where(seen, sorted_values, 0), self.starts, axis=0)
        counts = np.add.reduceat(seen.astype(np.int64), self.starts, axis=0)
        alone = np.diff(np.append(self.starts, len(self.rows)))[:, None] == 1
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums / counts
        return np.where(alone, sorted_values[self.starts], means)


def arrange(stamps: Stamps, file: Path, duplicates: str, zone: str | None = None) -> Order | None:
    """Return the order in which to use the rows of a table; None if they are in order. Changes are logged.

    Args:
        file: the table, for messages.
        duplicates: handling of rows with the same time: keep_first, keep_last, mean, or keep_all. keep_all keeps the
            order of the file, or reverses it if the newest row is first. "error" is the same as keep_all if all rows
            with the same time are adjacent.
        zone: see :func:`regularity`.

    Raises:
        UserError: for ``duplicates`` "error", if rows with the same time are not adjacent.
    """
    if duplicates not in DUPLICATES:
        raise UserError(
            f"data.duplicates={duplicates!r}: must be one of {', '.join(DUPLICATES)}{nearest(duplicates, DUPLICATES)}"
        )
    found = regularity(stamps, zone)
    rows = np.arange(len(stamps))
    if not found.duplicates and not found.irregular and not found.backward:
        return None
    falling = found.backward * 2 > len(stamps) - 1 - found.duplicates
    if duplicates == "error" and found.duplicates == int((stamps[1:] == stamps[:-1]).sum()):
        # Adjacent repeats, such as the one in the published Weather table, do not come from a file appended twice.
        duplicates = "keep_all"
    if duplicates == "keep_all" and found.duplicates:
        order = Order(rows[::-1] if falling else rows)
    else:
        order = Order(np.argsort(stamps, kind="stable"))
        if found.duplicates and duplicates == "error":
            raise UserError(_repeated(stamps, order.rows, found.duplicates, file))
    if not np.array_equal(order.rows, rows):
        fault = "the newest row is first" if falling else f"{found.backward} row(s) are earlier than the row before"
        logger.warning("%s: %s; the rows are sorted by time", file, fault)
    if found.irregular:
        logger.warning(
            "%s: %d time step(s) differ from the usual %s; the rows are used as if they were evenly spaced",
            file,
            found.irregular,
            found.step,
        )
    if not found.duplicates:
        return order
    logger.warning("%s: %d repeated timestamp(s) (data.duplicates=%s)", file, found.duplicates, duplicates)
    return _single(order, stamps[order.rows], duplicates)


def _single(order: Order, times: Stamps, duplicates: str) -> Order:
    """Drop or merge rows of ``order`` with the same time as ``duplicates`` says; ``times`` are in this order."""
    if duplicates == "keep_all":
        return order
    begins = np.append(True, times[1:] != times[:-1])
    if duplicates == "mean":
        return Order(order.rows, np.flatnonzero(begins))
    return Order(order.rows[begins if duplicates == "keep_first" else np.append(begins[1:], True)])


def _repeated(stamps: Stamps, rows: Int64s, count: int, file: Path) -> str:
    """Return the error message for repeated times; ``rows`` sorts the times."""
    again = int(np.argmax(stamps[rows][1:] == stamps[rows][:-1]))
    time = str(stamps[rows[again]].astype("datetime64[s]")).replace("T", " ")
    return (
        f"{file}: {count} repeated timestamp(s); {time} is in {place(file, int(rows[again]))} and in "
        f"{place(file, int(rows[again + 1]))}. Remove the repeated rows, or set data.duplicates=keep_first, keep_last, "
        "mean, or keep_all (all rows in the order of the file, for example hours of local time)"
    )
