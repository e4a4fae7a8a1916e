"""``mmtrain data prepare panel``: tables of many series into memory-mapped shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.data.prepare.output import complete_or_absent, existing_meta
from mmtrain.data.prepare.panel_writer import Layout, PanelWriter, Series
from mmtrain.data.series.panel import FORMAT, KIND
from mmtrain.data.series.split import SplitRule
from mmtrain.errors import UserError


@dataclass(frozen=True)
class PreparedPanel:
    """The folder, what its meta.json says, and whether it was written now (False: it was there already)."""

    out: Path
    meta: dict[str, Any]
    fresh: bool


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
    shard_mb: int = 64,
    force: bool = False,
) -> PreparedPanel:
    """Write the series in ``root`` to the new folder ``out``, for ``data.kind=panel``.

    ``root`` is a CSV or parquet file or a folder of them, in one of three layouts, told apart by their columns:

    - long: a row for each series and time, with an id column and a time column;
    - wide: a row for each series and a column for each step, with an id column and no time column;
    - files: a folder with one file for each series, without an id column; the name of the file is the id.

    Args:
        split: what the scalers are fitted for; another ``data.split`` fits them again at every start.
        id_column: default: the first column named id, unique_id, series_id or item_id.
        time_column: "date": the first column named date, datetime, timestamp or time; None: rows as they come.
        columns: the targets; default: all columns that are nothing else (of a wide panel: its steps).
        known: columns known in advance; rows behind the last target that have them are kept for forecasts.
        static: columns that do not change within a series: text (categories) or numbers.
        calendar: a table of ``time_column`` and columns that are known in advance and shared by all series.
        start, step: the times of a wide panel whose columns are not named by dates, such as 2011-01-29 and 1D.
        missing: holes: keep them (train with data.missing=mask), or ffill, interpolate, zero.
        duplicates: a time that comes twice in a series: error, or last (the last such row counts).
        shard_mb: MiB of a shard, and about half of what preparing holds in memory.

    Raises:
        UserError: with the file, the series and the cure.
    """
    from mmtrain.data.prepare.panel_files import Columns, open_source

    root, out = Path(root).expanduser(), Path(out).expanduser()
    chosen = Columns(
        id=id_column,
        time=time_column,
        targets=None if columns is None else list(columns),
        known=list(known),
        static=list(static),
    )
    settings: dict[str, Any] = {
        "id": id_column,
        "time": time_column,
        "columns": chosen.targets,
        "known": chosen.known,
        "static": chosen.static,
        "calendar": None if calendar is None else str(calendar),
        "start": start,
        "step": step,
        "missing": missing,
        "duplicates": duplicates,
    }
    if duplicates not in ("error", "last"):
        raise UserError(f"--duplicates {duplicates}: error or last")
    if shard_mb < 1:
        raise UserError(f"--shard-mb {shard_mb}: MiB, 1 or more")

    def source(part: Path) -> tuple[Layout, Iterator[Series]]:
        return open_source(root, chosen, part, calendar=calendar, start=start, step=step, duplicates=duplicates)

    return write_panel(
        out,
        source,
        source=str(root.absolute()),
        settings=settings,
        split=split,
        missing=missing,
        shard_bytes=shard_mb << 20,
        force=force,
    )


def write_panel(
    out: Path,
    open_source_in: Callable[[Path], tuple[Layout, Iterator[Series]]],
    *,
    source: str,
    settings: Mapping[str, Any],
    split: SplitRule,
    missing: str,
    shard_bytes: int = 64 << 20,
    force: bool = False,
) -> PreparedPanel:
    """Write ``out`` complete or not at all; a panel made of the same source with the same settings is left alone."""
    settings = {**settings, "split": split.to_json()}
    made_as = {"kind": KIND, "format": FORMAT}
    if (found := existing_meta(out, source, settings, made_as, force=force)) is not None:
        return PreparedPanel(out, found, fresh=False)
    with complete_or_absent(out, force=force, resume=False) as part:
        layout, series = open_source_in(part)
        writer = PanelWriter(part, layout, missing=missing, shard_bytes=shard_bytes)
        for one in series:
            writer.add(one)
        meta = writer.finish(split, {"source": source, "settings": settings})
    return PreparedPanel(out, meta, fresh=True)
