"""Prepare the M5 competition data: daily sales of 30,490 Walmart products, with prices, events and SNAP days.

Three files are read: sales.parquet (six id columns, then d_1, d_2, ...), prices_cents_wide.parquet (one row for each
row of the sales, one column for each week; 0: not on sale yet) and calendar.csv. The data is from Kaggle, for
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
#: Products read at a time; they need products × days × 2 arrays of 8 bytes.
_BATCH = 512


def prepare_m5(root: str | Path, out: str | Path, *, days: int = 28, force: bool = False) -> Prepared:
    """Prepare a panel from the three M5 files in ``root``.

    The target is ``sales``. Known in advance, for all days of the calendar, are ``price`` (dollars) of each product,
    and for its state ``snap``, ``event_cultural``, ``event_national``, ``event_religious`` and ``event_sporting``. The
    five ids are static. A series begins at its first price or sale, since the product was not on sale before. A day
    without a price takes the last price before it, or else the next one; the number of these days is logged.

    Args:
        out: the panel folder to write.
        days: length of the test split (the last days of each series), and of the validation split before it.
        force: replace an existing ``out``.

    Raises:
        UserError: if a file is missing or has other content.
    """
    root = Path(root).expanduser()
    lacking = [name for name in FILES if not (root / name).is_file()]
    if lacking:
        raise UserError(f"--root {root}: {', '.join(lacking)} missing; the folder must contain {', '.join(FILES)}")
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
    """Read the calendar; return it and its first day."""
    frame = read_frame(file)
    wanted = ("date", "wm_yr_wk", "d", "event_type_1", "event_type_2", *(f"snap_{state}" for state in STATES))
    if lacking := [name for name in wanted if name not in frame.columns]:
        raise UserError(f"{file}: columns {', '.join(lacking)} are missing; use the calendar.csv of M5")
    times = read_times(frame, file, "date")
    if times is None or (np.diff(times[0]) != np.timedelta64(1, "D")).any():
        raise UserError(f"{file}: the dates are not consecutive days; use the calendar.csv of M5")
    return frame, times[0][0]


def _shared(calendar: pd.DataFrame) -> NDArray[np.float32]:
    """Return the covariates of each state (states, days, snap and kinds of events)."""
    kinds = [
        ((calendar["event_type_1"] == kind) | (calendar["event_type_2"] == kind)).to_numpy(np.float32)
        for kind in EVENTS
    ]
    snap = [calendar[f"snap_{state}"].to_numpy(np.float32) for state in STATES]
    return np.stack([np.stack([days, *kinds], axis=1) for days in snap])


def _series(root: Path, calendar: pd.DataFrame) -> Iterator[Series]:
    """Yield the products, a batch at a time, after checks of the two files."""
    sales, prices = (root / name for name in FILES[:2])
    there, weeks = set(schema_of(sales).names), schema_of(prices).names
    days = [name for name in calendar["d"] if name in there]
    if lacking := [name for name in ("id", *STATIC) if name not in there]:
        raise UserError(f"{root / FILES[0]}: columns {', '.join(lacking)} are missing; use the sales of M5")
    if days != list(calendar["d"][: len(days)]) or not days:
        raise UserError(
            f"{root / FILES[0]}: the day columns must be d_1, d_2, ... without gaps; use the unmodified sales of M5"
        )
    week = {name: column for column, name in enumerate(weeks)}
    of_day = [week.get(f"w{number}", -1) for number in calendar["wm_yr_wk"]]
    if -1 in of_day:
        raise UserError(f"{root / FILES[1]}: a week of the calendar is missing; use the prices of M5")
    if (sold_rows := rows_of(sales)) != (priced_rows := rows_of(prices)):
        raise UserError(
            f"{root}: {FILES[0]} has {sold_rows} rows, but {FILES[1]} has {priced_rows}; use the files of M5, which "
            "have the same rows"
        )
    state = {name: number for number, name in enumerate(STATES)}
    pairs = batches(sales, ["id", *STATIC, *days], rows=_BATCH), batches(prices, weeks, rows=_BATCH)
    carried = 0
    for sold, priced in zip(*pairs, strict=True):
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
    logger.info(
        "%s: %d days without a price were filled with the last price before, or else the next one",
        root / FILES[1],
        carried,
    )
