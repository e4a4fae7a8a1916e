"""The order of a table's rows: sorted by time, with repeated times as the user wants them; how even the steps are."""

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
    """``duplicates``: rows whose time another row has before; ``backward``: rows before an earlier time.

    ``irregular``: steps between different times that are not ``step``, the commonest, which is None for one time only.
    No step of months or business days is irregular.
    """

    duplicates: int
    irregular: int
    backward: int
    step: pd.Timedelta | None


def regularity(stamps: Stamps, zone: str | None = None) -> Regularity:
    """How even the times (T,) are, wherever in the table they stand.

    ``zone``: the times are in UTC, and days and longer steps may be those of this zone, of 23 or 25 hours.
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
    """``rows`` (n,): which row of the table comes at each place; ``starts``: where those begin that become one."""

    rows: Int64s
    starts: Int64s | None = None

    @property
    def first(self) -> Int64s:
        """For each row of the result one of the rows that it is made from."""
        return self.rows if self.starts is None else self.rows[self.starts]

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, M) values in this order; of several rows that become one the mean of what is no hole."""
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
    """The order in which the rows of a table are used; None for the order that they have. What is done is said.

    Args:
        duplicates: of rows with one time: keep_first, keep_last, mean, or keep_all, which leaves the rows as they come
            (but turns a table round that has its newest row first); error is keep_all where such rows are neighbours.
        zone: see :func:`regularity`.

    Raises:
        UserError: for repeated times that are not neighbours, with duplicates "error".
    """
    if duplicates not in DUPLICATES:
        raise UserError(
            f"data.duplicates={duplicates!r}: one of {', '.join(DUPLICATES)}{nearest(duplicates, DUPLICATES)}"
        )
    found = regularity(stamps, zone)
    rows = np.arange(len(stamps))
    if not found.duplicates and not found.irregular and not found.backward:
        return None
    falling = found.backward * 2 > len(stamps) - 1 - found.duplicates
    if duplicates == "error" and found.duplicates == int((stamps[1:] == stamps[:-1]).sum()):
        duplicates = "keep_all"  # all are neighbours, as one in the published Weather table: no rows were appended
    if duplicates == "keep_all" and found.duplicates:
        order = Order(rows[::-1] if falling else rows)
    else:
        order = Order(np.argsort(stamps, kind="stable"))
        if found.duplicates and duplicates == "error":
            raise UserError(_repeated(stamps, order.rows, found.duplicates, file))
    if not np.array_equal(order.rows, rows):
        what = "the newest row comes first" if falling else f"{found.backward} row(s) come before earlier ones"
        logger.warning("%s: %s; the rows are sorted by time", file, what)
    if found.irregular:
        logger.warning(
            "%s: %d step(s) differ from the usual %s; rows are taken as they come", file, found.irregular, found.step
        )
    if not found.duplicates:
        return order
    logger.warning("%s: %d repeated time stamp(s) (data.duplicates=%s)", file, found.duplicates, duplicates)
    return _single(order, stamps[order.rows], duplicates)


def _single(order: Order, times: Stamps, duplicates: str) -> Order:
    if duplicates == "keep_all":
        return order
    begins = np.append(True, times[1:] != times[:-1])
    if duplicates == "mean":
        return Order(order.rows, np.flatnonzero(begins))
    return Order(order.rows[begins if duplicates == "keep_first" else np.append(begins[1:], True)])


def _repeated(stamps: Stamps, rows: Int64s, count: int, file: Path) -> str:
    again = int(np.argmax(stamps[rows][1:] == stamps[rows][:-1]))
    time = str(stamps[rows[again]].astype("datetime64[s]")).replace("T", " ")
    return (
        f"{file}: {count} repeated time stamp(s); {time} stands in {place(file, int(rows[again]))} and in "
        f"{place(file, int(rows[again + 1]))}. Remove them, or say what to use: data.duplicates=keep_first, keep_last, "
        "mean, or keep_all (the rows as they come, such as hours in local time)"
    )
