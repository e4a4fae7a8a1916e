"""Prepare a panel from tables of many series (``mmtrain data prepare panel``).

Three layouts are supported and recognised by their columns: long, wide, and one file for each series.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.prepare.output import Origin, Prepared
from mmtrain.data.prepare.panel_long import find_dates, open_long
from mmtrain.data.prepare.panel_writer import Layout, Series, write_panel
from mmtrain.data.prepare.tables import Columns, batches, is_number, numbers_of, schema_of, table_files
from mmtrain.data.series.files import TableFormat, listed
from mmtrain.data.series.split import SplitRule
from mmtrain.data.series.table import TIME_NAMES, read_table
from mmtrain.data.series.timeline import Step, Timeline, timeline_of, to_utc
from mmtrain.data.series.times import find_reading
from mmtrain.errors import UserError, nearest
from mmtrain.log import logger

ID_NAMES = ("id", "unique_id", "series_id", "item_id")
_WIDE_ROWS = 512


def prepare_panel(
    root: str | Path,
    out: str | Path,
    *,
    split: SplitRule,
    id_column: str | None = None,
    time_column: str | None = "date",
    columns: Sequence[str] | None = None,
    known: Sequence[str] = (),
    static: Sequence[str] = (),
    calendar: str | Path | None = None,
    start: str | None = None,
    step: str | None = None,
    missing: str = "keep",
    duplicates: str = "error",
    form: TableFormat | None = None,
    shard_mb: int = 64,
    force: bool = False,
) -> Prepared:
    """Write the series in ``root`` as a panel to the folder ``out``, for ``data.kind=panel``.

    ``root`` is a CSV or parquet file, or a folder of them, in one of three layouts, recognised by the columns:

    - long: one row for each series and time, with an id column and a time column;
    - wide: one row for each series and one column for each time step, with an id column and no time column;
    - files: a folder with one file for each series and no id column; the name of a file is the id of its series.

    Args:
        split: the split that the saved scalers are fitted for. Training with another ``data.split`` fits new scalers
            at each start.
        id_column: default: the first column named id, unique_id, series_id or item_id.
        time_column: "date": the first column named date, datetime, timestamp, time or ds, or else the only column that
            contains dates. None: no times; the rows are used in the order of the file.
        columns: target columns; default: all other columns of numbers (in a wide panel: its time steps).
        known: columns known in advance. Rows after the last target that have them are kept for forecasts.
        static: columns that are constant within a series: text (categories) or numbers.
        calendar: table with a time column, and columns known in advance that all series share.
        start, step: first time and time step of a wide panel whose columns are not named by dates, such as 2011-01-29
            and 1D. ``step`` alone replaces the time step that is inferred from the times.
        missing: handling of missing values: keep (train with data.missing=mask), ffill, interpolate or zero.
        duplicates: handling of a time that a series has twice: error, or last (use the last of these rows).
        form: how the files are written; None detects it.
        shard_mb: size of a shard in MiB. Preparation needs about twice as much memory.
        force: replace an existing ``out``.

    Raises:
        UserError: for any fault of the files or arguments; the message names the file or argument, and the cure.
    """
    root = Path(root).expanduser()
    form = form or TableFormat()
    chosen = Columns(id_column, time_column, list(columns or ()), list(known), list(static), form)
    settings: dict[str, Any] = {
        "id": id_column,
        "time": time_column,
        "columns": None if columns is None else chosen.targets,
        "known": chosen.known,
        "static": chosen.static,
        "calendar": None if calendar is None else str(calendar),
        "start": start,
        "step": step,
        "missing": missing,
        "duplicates": duplicates,
        **{key: value for key, value in vars(form).items() if value is not None},
    }
    if duplicates not in ("error", "last"):
        raise UserError(f"--duplicates {duplicates}: must be error or last")
    if shard_mb < 1:
        raise UserError(f"--shard-mb {shard_mb}: must be at least 1 (MiB)")

    def source(part: Path) -> tuple[Layout, Iterator[Series]]:
        files = table_files(root)
        wide, found = _find_columns(files[0], chosen, one_file=not root.is_dir())
        given = None if step is None else Step.parse(step)
        if wide:
            layout, series = _open_wide(files, found, start, given)
        elif start is not None:
            raise UserError(
                f"--start {start}: only for a wide panel (one column for each time step); leave it out, the files "
                "contain the times"
            )
        else:
            layout, series = open_long(files, found, part, given, duplicates)
        return (layout if calendar is None else _with_calendar(layout, calendar, form)), series

    return write_panel(
        Path(out).expanduser(),
        source,
        origin=Origin.of(root, calendar),
        settings=settings,
        split=split,
        missing=missing,
        shard_bytes=shard_mb << 20,
        force=force,
    )


def _find_columns(file: Path, chosen: Columns, *, one_file: bool) -> tuple[bool, Columns]:
    """Return whether the panel is wide, and its columns by use.

    Raises:
        UserError: if a chosen column does not exist, or the file is not a panel.
    """
    schema = schema_of(file, chosen.form)
    names = schema.names
    for flag, wanted in (
        ("--known", chosen.known),
        ("--static", chosen.static),
        ("--columns", chosen.targets),
        ("--id", [] if chosen.id is None else [chosen.id]),
        ("--time", [] if chosen.time in (None, "date") else [chosen.time]),
    ):
        for name in wanted:
            if name not in names:
                raise UserError(
                    f"{file}: {flag} {name}: there is no such column{nearest(name, names)}; the columns are "
                    f"{listed(names)}"
                )
    lowered = {name.strip().lower(): name for name in reversed(names)}
    ids = chosen.id or next((lowered[name] for name in ID_NAMES if name in lowered), None)
    time = chosen.time
    if time is not None and time not in names:
        time = next((lowered[name] for name in (*TIME_NAMES, "ds") if name in lowered), None)
    if ids is not None and ids == time:
        raise UserError(f"{file}: {ids!r} cannot be both the id column (--id) and the time column (--time)")
    if time is None and chosen.time is not None:
        used = (ids, *chosen.targets, *chosen.known, *chosen.static)
        texts = [f.name for f in schema if f.name not in used and not is_number(f.type)]
        time = find_dates(file, ids, texts, chosen.form) if texts else None
        if time is not None:
            logger.info("%s: column %r contains dates and is used as the time column (--time)", file, time)
    for flag, wanted in (("--known", chosen.known), ("--static", chosen.static), ("--columns", chosen.targets)):
        for name in wanted:
            if name in (ids, time):
                use = "id" if name == ids else "time"
                raise UserError(f"{file}: {flag} {name}: it is the {use} column; leave it out, or give another --{use}")
    if ids is None and one_file:
        raise UserError(
            f"{file}: there is no id column ({', '.join(ID_NAMES)}), so the table has one series: train on it with "
            "data.kind=series, or name the id column with --id"
        )
    untimed = time is None and chosen.time is not None
    if ids is None and untimed:
        raise UserError(
            f"{file}: there is no time column ({', '.join(TIME_NAMES)}); name it with --time, or give --time none"
        )
    targets = chosen.targets
    if not targets:
        free = [name for name in names if name not in (ids, time, *chosen.known, *chosen.static)]
        targets = [name for name in free if is_number(schema.field(name).type)]
        if text := [name for name in free if name not in targets]:
            logger.warning(
                "%s: ignored columns without numbers: %s (name them with --static to use them)", file, ", ".join(text)
            )
    if not targets:
        raise UserError(f"{file}: there is no target column; its columns are {listed(names)}. Set --columns")
    if len({*targets, *chosen.known, *chosen.static}) < len(targets) + len(chosen.known) + len(chosen.static):
        raise UserError(f"{file}: --columns, --known and --static name a column twice; name each column once")
    return untimed, replace(chosen, id=ids, time=time, targets=targets)


def _open_wide(
    files: list[Path], columns: Columns, start: str | None, step: Step | None
) -> tuple[Layout, Iterator[Series]]:
    """Return the layout of a wide panel and the stream of its series."""
    steps = columns.targets
    if columns.known:
        raise UserError(
            f"--known {', '.join(columns.known)}: not possible for a wide panel, which has one value for each time "
            "step; use --calendar, or a long table"
        )
    layout = Layout(["value"], (), columns.static, timeline=_wide_timeline(files[0], steps, start, step, columns.form))

    def series() -> Iterator[Series]:
        names = [str(columns.id), *columns.static, *steps]
        nothing = np.empty((len(steps), 0))
        for file in files:
            numeric = {f.name for f in schema_of(file, columns.form) if f.name in columns.static and is_number(f.type)}
            text = {str(columns.id), *columns.static} - numeric
            for batch in batches(file, names, text, _WIDE_ROWS, columns.form):
                values = numbers_of(batch, steps, file)[:, :, None]
                ids = [str(name) for name in batch.column(str(columns.id)).to_pylist()]
                static = [batch.column(name).to_pylist() for name in columns.static]
                for row, name in enumerate(ids):
                    yield Series(name, values[row], nothing, 0, tuple(column[row] for column in static))

    return layout, series()


def _wide_timeline(
    file: Path, steps: list[str], start: str | None, step: Step | None, form: TableFormat
) -> Timeline | None:
    """Return the times of the columns ``steps``: by ``start`` and ``step``, or by their names if these are dates."""
    if start is not None and step is not None:
        try:
            return timeline_of(np.array([np.datetime64(start.strip().replace(" ", "T"), "us")]), step)
        except ValueError:
            raise UserError(f"--start {start}: must be a time such as 2011-01-29 or 2011-01-29T06:00") from None
    stamps = _dates(steps, file, form.time_format)
    if start is not None or (step is not None and stamps is None):
        raise UserError("--start and --step: give both, the time of the first column and the time step between columns")
    if stamps is None:
        logger.info("%s: the columns are not named by dates; without --start and --step the panel has no times", file)
        return None
    if (timeline := timeline_of(stamps, step)) is not None:
        positions, valid = timeline.positions(stamps)
        if valid.all() and (positions == np.arange(len(positions))).all():
            return timeline
    raise UserError(
        f"{file}: the dates of the columns {steps[0]} to {steps[-1]} are not evenly spaced; add the missing columns"
    )


def _dates(names: list[str], file: Path, time_format: str | None) -> NDArray[np.datetime64] | None:
    """Return the dates that are the names of columns; None if some name is not a date."""
    import pandas as pd

    if any(name.strip().isdigit() and len(name.strip()) < 6 for name in names):
        return None  # names such as 1, 2, 3 number the time steps and are not years
    column = pd.Series(names)
    reading = find_reading(column, f"{file}: the names of the columns", time_format)
    made = None if reading is None else reading.stamps(column)
    return None if made is None or np.isnat(made).any() else made


def _with_calendar(layout: Layout, calendar: str | Path, form: TableFormat) -> Layout:
    """Return ``layout`` with the columns of the table ``calendar`` as shared covariates."""
    table = read_table(calendar, form=replace(form, duplicates="keep_last"))
    if layout.timeline is None or table.stamps is None:
        raise UserError(f"--calendar {calendar}: both the calendar and the data must have a time column")
    stamps = table.stamps
    if layout.zone is not None and table.zone is None:
        stamps = to_utc(stamps, layout.zone)  # a calendar without a zone is in the zone of the data
    positions, valid = layout.timeline.positions(stamps)
    if not valid.all():
        raise UserError(
            f"--calendar {calendar}: {table.stamps[np.argmin(valid)]} is not a whole number of time steps "
            f"({layout.timeline.step}) from the first time of the data; correct it"
        )
    kept = positions >= 0
    count = int(positions.max()) + 1 if kept.any() else 0
    shared = np.full((1, count, len(table.columns)), np.nan)
    shared[0, positions[kept]] = table.values[kept]
    holes = np.flatnonzero(~np.isfinite(shared).all(axis=(0, 2)))
    if len(holes) or not count:
        lacking = layout.timeline.stamps(int(holes[0]) if len(holes) else 0, 1)[0]
        raise UserError(f"--calendar {calendar}: there is no row for {lacking}, a time of the data; add it")
    return replace(layout, shared_columns=table.columns, shared=shared)
