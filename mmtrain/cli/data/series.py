"""``mmtrain data prepare`` for series: panels, and the table of the demo."""

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
    str | None,
    typer.Option("--split", help="Kind of split: ratio, date or last. Follows from the next three options if given."),
]
Ratios = Annotated[
    str | None, typer.Option(metavar="A,B,C", help="Fractions of training, validation and test, such as 0.7,0.1,0.2.")
]
Dates = Annotated[str | None, typer.Option(metavar="A,B", help="First dates of validation and of test.")]
Last = Annotated[
    str | None, typer.Option(metavar="A,B", help="Lengths of validation and test at the end, in time steps.")
]


def names(text: str | None) -> list[str]:
    """Split "a,b" at its commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def split_rule(kind: str | None, ratios: str | None, dates: str | None, last: str | None) -> SplitRule | None:
    """Return the split that the options describe, or None if none is given.

    Raises:
        UserError: If the options contradict each other or are not numbers.
    """
    given = {"ratio": ratios, "date": dates, "last": last}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1 or (kind in given and named and named != [kind]):
        raise UserError(
            f"--split {kind or ''}: give only one of --ratios, --dates and --last, and the one of this kind"
        )
    kind = kind or (named[0] if named else None)
    if kind is None:
        return None
    if kind in ("etth", "ettm"):
        return SplitRule(kind)
    if kind not in given:
        raise UserError(f"--split {kind}: choose ratio, date or last (for a table also etth or ettm)")
    parts = names(given[kind])
    if kind != "ratio" and not parts:
        raise UserError(f"--split {kind}: requires --{'dates' if kind == 'date' else 'last'} A,B")
    try:
        numbers = [] if kind == "date" else [float(part) if kind == "ratio" else int(part) for part in parts]
    except ValueError:
        flag, example = ("ratios", "0.7,0.1,0.2") if kind == "ratio" else ("last", "28,28")
        raise UserError(f"--{flag} {given[kind]}: write numbers separated by commas, such as {example}") from None
    return SplitRule.make(kind, numbers or [0.7, 0.1, 0.2], parts, numbers)


def panel_command(
    root: Annotated[Path, typer.Option(help="CSV or parquet file, or folder of such files.")],
    out: Out,
    id: Annotated[
        str | None, typer.Option(help="Column with the id of the series (default: id, unique_id, ...).")
    ] = None,
    time: Annotated[str, typer.Option(help="Time column, or none to use the order of rows.")] = "date",
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Columns to forecast (default: all others).")
    ] = None,
    known: Annotated[str | None, typer.Option(metavar="A,B,...", help="Columns known in advance.")] = None,
    static: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Columns that are constant within a series.")
    ] = None,
    calendar: Annotated[
        Path | None, typer.Option(help="Table of dates and columns known in advance that all series share.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="For a table with one row per series: time of the first column.")
    ] = None,
    step: Annotated[
        str | None, typer.Option(help="Time step: 15min, h, D, W, M, Q, Y (default: the most frequent one).")
    ] = None,
    missing: Annotated[
        str, typer.Option(help="Missing values: keep (for data.missing=mask), ffill, interpolate or zero.")
    ] = "keep",
    duplicates: Annotated[
        str, typer.Option(help="Repeated times in a series: error, or last (use the last row).")
    ] = "error",
    separator: Separator = None,
    decimal: Decimal = None,
    time_format: TimeFormat = None,
    split: SplitName = None,
    ratios: Ratios = None,
    dates: Dates = None,
    last: Last = None,
    shard_mb: Annotated[int, typer.Option(help="Approximate size of a shard in MiB.")] = 64,
    force: Force = False,
) -> None:
    """Convert tables of many series to a panel of memory-mapped shards, for data.kind=panel.

    The input is a long table (one row per series and time), a table with one row per series and one column per time
    step (without a time column), or a folder with one file per series (without an id column). The scalers are fitted to
    the training part of the given split (default: ratios 0.7,0.1,0.2).

    \b
    Examples:
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
    days: Annotated[
        int, typer.Option(help="Length in days of the test split and of the validation split before it.")
    ] = 28,
    force: Force = False,
) -> None:
    """Convert M5 (daily sales of 30,490 products with prices, events and SNAP days) to a panel, for --config tsm2_m5.

    sales.parquet is M5's sales_train_evaluation.csv as parquet, with the columns id, item_id, dept_id, cat_id,
    store_id, state_id, d_1, d_2, ... prices_cents_wide.parquet is made from sell_prices.csv: it has the same rows, and
    one column per week (w11101, ...) with the price in cents, or 0 without a price. calendar.csv is M5's own.

    \b
    Examples:
      mmtrain data prepare m5 --root m5 --out data/m5
    """
    _report(prepare_m5(**locals()))


def _report(done: Prepared) -> None:
    counts = done.meta["counts"]
    notes = {
        "holes": "missing values kept (data.missing=mask)",
        "filled": "missing values filled",
        "known_filled": "missing values in known columns filled",
        "ahead": "rows known in advance",
        "empty": "empty series left out",
    }
    details = "".join(f"; {counts[key]} {text}" for key, text in notes.items() if counts[key])
    state = "written" if done.fresh else "already exists, nothing to do"
    typer.echo(
        f"{done.out}: {counts['series']} series of {counts['shortest']} to {counts['longest']} rows, {counts['rows']} "
        f"in all, {done.meta['shards']} shard(s){details}; {state}"
    )


def traffic_command(out: Out) -> None:
    """Write the table of the demo, two years of real hourly road traffic and weather, to OUT/traffic.csv.

    \b
    Examples:
      mmtrain data prepare traffic --out data/traffic
    """
    report = prepare_traffic(out)
    typer.echo(
        f"{report.file}: {report.rows} hours"
        + ("" if report.fresh else " (already exists)")
        + f"; {report.holes} hours without a measurement (at most {report.longest} in a row) interpolated"
        + "".join(
            f"; {name}: {count} values more than 8 standard deviations from the mean, kept"
            for name, count in report.outliers.items()
        )
    )
