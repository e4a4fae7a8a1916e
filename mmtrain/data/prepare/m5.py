"""The M5 competition's daily sales of 30,490 Walmart products, with their prices, events and SNAP days.

It reads three files: sales.parquet (six id columns, then d_1, d_2, ...), prices_cents_wide.parquet (one row
for each row of the sales, one column for each week; 0: not on sale yet) and calendar.csv. The data is Kaggle's, for
non-commercial and academic use.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.prepare.output import Origin, Prepared
from mmtrain.data.prepare.panel_writer import Layout, Series, write_panel
from mmtrain.data.prepare.tables import batches, numbers_of, rows_of, schema_of
from mmtrain.data.series.files import read_frame
from mmtrain.data.series.split import SplitRule
from mmtrain.data.series.table import carry, read_times
from mmtrain.data.series.timeline import UNITS, Step, Timeline
from mmtrain.errors import UserError
from mmtrain.log import logger

if TYPE_CHECKING:
    import pandas as pd

FILES = ("sales.parquet", "prices_cents_wide.parquet", "calendar.csv")
STATIC = ("item_id", "dept_id", "cat_id", "store_id", "state_id")
STATES = ("CA", "TX", "WI")
EVENTS = ("Cultural", "National", "Religious", "Sporting")
#: Rows read at once: products × days × 2 arrays of 8 bytes.
_BATCH = 512


def prepare_m5(root: str | Path, out: str | Path, *, days: int = 28, force: bool = False) -> Prepared:
    """Write the panel of ROOT's three files to OUT.

    Target ``sales``; known in advance ``price`` (in dollars) of each product, and for its state ``snap`` and
    ``event_cultural``, ``event_national``, ``event_religious``, ``event_sporting``, for all days of the calendar.
    Static are the five ids. A series begins at its first price or sale: before that the product was not on sale. A day
    without a price takes the one before, or else the next one; how many there are is said. The last ``days`` are the
    test split, those before them validation.

    Raises:
        UserError: for a file that is missing, or not as described.
    """
    root = Path(root).expanduser()
    lacking = [name for name in FILES if not (root / name).is_file()]
    if lacking:
        raise UserError(f"--root {root}: it lacks {', '.join(lacking)} (wanted are {', '.join(FILES)})")
    calendar, first = _calendar(root / FILES[2])
    layout = Layout(
        columns=["sales"],
        known=["price"],
        static=STATIC,
        shared_columns=["snap", *(f"event_{kind.lower()}" for kind in EVENTS)],
        shared=_shared(calendar),
        timeline=Timeline(first, Step(UNITS["D"])),
    )
    split = SplitRule("last", last=(days, days))
    return write_panel(
        Path(out).expanduser(),
        lambda part: (layout, _series(root, calendar)),
        origin=Origin.of(root),
        settings={"m5": True},
        split=split,
        missing="keep",
        force=force,
    )


def _calendar(file: Path) -> tuple[pd.DataFrame, np.datetime64]:
    """The calendar and its first day."""
    frame = read_frame(file)
    wanted = ("date", "wm_yr_wk", "d", "event_type_1", "event_type_2", *(f"snap_{state}" for state in STATES))
    if lacking := [name for name in wanted if name not in frame.columns]:
        raise UserError(f"{file}: columns {', '.join(lacking)} are missing: not the calendar of M5")
    times = read_times(frame, file, "date")
    if times is None or (np.diff(times[0]) != np.timedelta64(1, "D")).any():
        raise UserError(f"{file}: its dates are not one day after the other: not the calendar of M5")
    return frame, times[0][0]


def _shared(calendar: pd.DataFrame) -> NDArray[np.float32]:
    """(states, days, snap and kinds of events)."""
    kinds = [
        ((calendar["event_type_1"] == kind) | (calendar["event_type_2"] == kind)).to_numpy(np.float32)
        for kind in EVENTS
    ]
    snap = [calendar[f"snap_{state}"].to_numpy(np.float32) for state in STATES]
    return np.stack([np.stack([days, *kinds], axis=1) for days in snap])


def _series(root: Path, calendar: pd.DataFrame) -> Iterator[Series]:
    sales, prices = (root / name for name in FILES[:2])
    there, weeks = set(schema_of(sales).names), schema_of(prices).names
    days = [name for name in calendar["d"] if name in there]
    if lacking := [name for name in ("id", *STATIC) if name not in there]:
        raise UserError(f"{root / FILES[0]}: columns {', '.join(lacking)} are missing: not the sales of M5")
    if days != list(calendar["d"][: len(days)]) or not days:
        raise UserError(f"{root / FILES[0]}: its days are not d_1, d_2, ... without a gap")
    week = {name: place for place, name in enumerate(weeks)}
    of_day = [week.get(f"w{number}", -1) for number in calendar["wm_yr_wk"]]
    if -1 in of_day:
        raise UserError(f"{root / FILES[1]}: a week of the calendar is missing: not the prices of M5")
    if (sold_rows := rows_of(sales)) != (priced_rows := rows_of(prices)):
        raise UserError(f"{root}: {sold_rows} rows of sales and {priced_rows} of prices")
    state = {name: place for place, name in enumerate(STATES)}
    both = batches(sales, ["id", *STATIC, *days], rows=_BATCH), batches(prices, weeks, rows=_BATCH)
    carried = 0
    for sold, priced in zip(*both, strict=True):
        price = numbers_of(priced, weeks, prices)[:, of_day] / 100
        values = np.full((sold.num_rows, len(calendar)), np.nan)
        values[:, : len(days)] = numbers_of(sold, days, sales)
        text = {name: sold.column(name).to_pylist() for name in ("id", *STATIC)}
        for row in range(sold.num_rows):
            begin = int(np.argmax((price[row] > 0) | (values[row] > 0)))
            unpriced = price[row, begin:] == 0
            carried += int(unpriced.sum())
            if not unpriced.all():
                carry(price[row, begin:], unpriced)
            ids: tuple[Any, ...] = tuple(text[name][row] for name in STATIC)
            yield Series(
                text["id"][row],
                values[row, begin:, None],
                price[row, begin:, None],
                begin,
                ids,
                state[text["state_id"][row]],
            )
    logger.info("%s: %d days without a price have that of the nearest day before, else after", root / FILES[1], carried)
