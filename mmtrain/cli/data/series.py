"""``mmtrain data prepare`` for series: many of them into a panel, and the demo's table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtrain.cli.common import Decimal, Force, Out, Separator, TimeFormat
from mmtrain.data.prepare.demo import prepare_traffic
from mmtrain.data.prepare.m5 import prepare_m5
from mmtrain.data.prepare.output import Prepared
from mmtrain.data.prepare.panel import prepare_panel
from mmtrain.data.series.files import TableFormat
from mmtrain.data.series.split import SplitRule
from mmtrain.errors import UserError

SplitName = Annotated[
    str | None, typer.Option("--split", help="ratio, date or last: only needed where none of the next three is given.")
]
Ratios = Annotated[str | None, typer.Option(metavar="A,B,C", help="Parts for training, validation and test.")]
Dates = Annotated[str | None, typer.Option(metavar="A,B", help="The first dates of validation and of test.")]
Last = Annotated[str | None, typer.Option(metavar="A,B", help="The last steps of validation and of test.")]


def names(text: str | None) -> list[str]:
    """From "a,b"."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def split_rule(kind: str | None, ratios: str | None, dates: str | None, last: str | None) -> SplitRule | None:
    """The split of the options; None where none is given.

    Raises:
        UserError: for options that contradict each other, or hold no numbers.
    """
    given = {"ratio": ratios, "date": dates, "last": last}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1 or (kind in given and named and named != [kind]):
        raise UserError(f"--split {kind or ''}: give one of --ratios, --dates and --last")
    kind = kind or (named[0] if named else None)
    if kind is None:
        return None
    if kind in ("etth", "ettm"):
        return SplitRule(kind)
    if kind not in given:
        raise UserError(f"--split {kind}: choose ratio, date or last (a table also etth or ettm)")
    parts = names(given[kind])
    if kind != "ratio" and not parts:
        raise UserError(f"--split {kind}: give --{'dates' if kind == 'date' else 'last'} A,B")
    try:
        numbers = [] if kind == "date" else [float(part) if kind == "ratio" else int(part) for part in parts]
    except ValueError:
        raise UserError(f"--{'ratios' if kind == 'ratio' else 'last'} {given[kind]}: numbers with commas") from None
    return SplitRule.make(kind, numbers or [0.7, 0.1, 0.2], parts, numbers)


def panel_command(
    root: Annotated[Path, typer.Option(help="A CSV or parquet file, or a folder of them.")],
    out: Out,
    id: Annotated[
        str | None, typer.Option(help="The column that tells series apart (default: id, unique_id, ...).")
    ] = (None),
    time: Annotated[str, typer.Option(help="The time column, or none: rows as they come.")] = "date",
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="What to forecast (default: the rest).")
    ] = None,
    known: Annotated[str | None, typer.Option(metavar="A,B,...", help="Columns known in advance.")] = None,
    static: Annotated[str | None, typer.Option(metavar="A,B,...", help="Columns that do not change in a series.")] = (
        None
    ),
    calendar: Annotated[
        Path | None, typer.Option(help="A table of dates and of columns known in advance, the same for all series.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="Wide: the time of the first step, such as 2011-01-29.")] = None,
    step: Annotated[
        str | None, typer.Option(help="The step: 15min, h, D, W, M, Q, Y (default: the usual one).")
    ] = None,
    missing: Annotated[str, typer.Option(help="Holes: keep (data.missing=mask), ffill, interpolate or zero.")] = "keep",
    duplicates: Annotated[
        str, typer.Option(help="A time twice in a series: error, or last (the last row counts).")
    ] = "error",
    separator: Separator = None,
    decimal: Decimal = None,
    time_format: TimeFormat = None,
    split: SplitName = None,
    ratios: Ratios = None,
    dates: Dates = None,
    last: Last = None,
    shard_mb: Annotated[int, typer.Option(help="MiB of a shard, about.")] = 64,
    force: Force = False,
) -> None:
    """Tables of many series into memory-mapped shards, for data.kind=panel.

    Long (a row for each series and time), wide (a row for each series, a column for each step; no time column), or a
    folder with a file for each series (no id column). The scalers are fitted for the split given (ratio 0.7,0.1,0.2
    otherwise).

    \b
    For example:
        mmtrain data prepare panel --root sales.csv --out data/sales --id shop \\
            --columns sold --known price --static city --last 28,28
    """
    done = prepare_panel(
        root,
        out,
        split=split_rule(split, ratios, dates, last) or SplitRule("ratio", parts=(0.7, 0.1, 0.2)),
        id_column=id,
        time_column=None if time == "none" else time,
        columns=names(columns) or None,
        known=names(known),
        static=names(static),
        calendar=calendar,
        start=start,
        step=step,
        missing=missing,
        duplicates=duplicates,
        form=TableFormat(separator, decimal, time_format),
        shard_mb=shard_mb,
        force=force,
    )
    _report(done)


def m5_command(
    root: Annotated[Path, typer.Option(help="Folder with sales.parquet, prices_cents_wide.parquet, calendar.csv.")],
    out: Out,
    days: Annotated[int, typer.Option(help="Days of the test split, and of validation before it.")] = 28,
    force: Force = False,
) -> None:
    """M5: daily sales of 30,490 products with prices, events and SNAP days, for configs/tsm2_m5.yaml.

    sales.parquet has the columns id, item_id, dept_id, cat_id, store_id, state_id, d_1, d_2, ... (M5's
    sales_train_evaluation.csv as parquet); prices_cents_wide.parquet a row for each of its rows and a column w11101,
    ... for each week, in cents, 0 where there is none (from sell_prices.csv); calendar.csv is M5's own.
    """
    _report(prepare_m5(**locals()))


def _report(done: Prepared) -> None:
    counts = done.meta["counts"]
    notes = {
        "holes": "holes kept (data.missing=mask)",
        "filled": "holes filled",
        "known_filled": "holes in known columns filled",
        "ahead": "rows known ahead",
        "empty": "empty series left out",
    }
    said = "".join(f"; {counts[key]} {text}" for key, text in notes.items() if counts[key])
    state = "written" if done.fresh else "was there already, nothing to do"
    typer.echo(
        f"{done.out}: {counts['series']} series of {counts['shortest']} to {counts['longest']} rows, {counts['rows']} "
        f"in all, {done.meta['shards']} shard(s){said}; {state}"
    )


def traffic_command(out: Out) -> None:
    """Two years of hourly road traffic and weather: OUT/traffic.csv."""
    report = prepare_traffic(out)
    typer.echo(
        f"{report.file}: {report.rows} hours"
        + ("" if report.fresh else " (was there already)")
        + f"; {report.holes} hours without a measurement (at most {report.longest} in a row) filled linearly"
        + "".join(f"; {name}: {count} values beyond 8 deviations, kept" for name, count in report.outliers.items())
    )
