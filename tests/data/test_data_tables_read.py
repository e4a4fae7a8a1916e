"""The one door for tables: encodings, separators, decimal marks, dates, zones, repeated times; each row is one file.

Every file is read, or refused with a message that says how to read it; none is read wrongly.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmtrain.data.prepare.panel import prepare_panel
from mmtrain.data.series import dialect
from mmtrain.data.series.describe import describe_table
from mmtrain.data.series.files import TableFormat
from mmtrain.data.series.order import regularity
from mmtrain.data.series.panel import open_panel
from mmtrain.data.series.split import SplitRule
from mmtrain.data.series.table import read_table
from mmtrain.data.series.times import find_reading, shown
from mmtrain.errors import UserError
from mmtrain.inference.predict import Forecast

pytestmark = pytest.mark.filterwarnings("error")

HOURS = pd.date_range("2022-01-01", periods=40, freq="h")
DAYS = pd.date_range("2020-01-22", periods=30)
MONTHS = pd.date_range("2010-01-01", periods=30, freq="MS")


def rows(times: Any, line: str = "{t},{i}.5,{i}", header: str = "date,a,b", end: str = "\n") -> str:
    return header + end + "".join(line.format(t=time, i=i) + end for i, time in enumerate(times))


def written(times: pd.DatetimeIndex, form: str) -> list[str]:
    return list(times.strftime(form))


GERMAN = [f"{t:%d.%m.%Y %H:%M};{i},5;{i}" for i, t in enumerate(HOURS)]
#: content, and what is found: columns, the first value of the first of them, the first time and the last one.
READ: dict[str, tuple[str | bytes, str, float, str | None, str | None]] = {
    "comma": (rows(HOURS), "a b", 0.5, "2022-01-01 00:00:00", "2022-01-02 15:00:00"),
    "crlf": (rows(HOURS, end="\r\n"), "a b", 0.5, "2022-01-01 00:00:00", "2022-01-02 15:00:00"),
    "old mac": (rows(HOURS, end="\r"), "a b", 0.5, "2022-01-01 00:00:00", "2022-01-02 15:00:00"),
    "blank lines": (rows(HOURS).replace("\n", "\n\n") + "\n \n", "a b", 0.5, "2022-01-01 00:00:00", None),
    "quotes": (rows(HOURS, '"{t}","{i}.5","{i}"', '"date","a, in ""kW""","b\nc"'), 'a, in "kW"|b\nc', 0.5, None, None),
    "german": (
        "Datum;Last, kW;b\n" + "\n".join(GERMAN),
        "Last, kW|b",
        0.5,
        "2022-01-01 00:00:00",
        "2022-01-02 15:00:00",
    ),
    "thousandths": (rows(HOURS, "{t};{i},125;{i}", "date;a;b"), "a b", 0.125, None, None),
    "tab": (rows(HOURS, "{t}\t{i}.5\t{i}", "date\ta\tb"), "a b", 0.5, None, "2022-01-02 15:00:00"),
    "pipe": (rows(HOURS, "{t}|{i}.5|{i}", "date|a|b"), "a b", 0.5, None, None),
    "trailing commas": (rows(HOURS, "{t},{i}.5,{i},"), "a b", 0.5, "2022-01-01 00:00:00", "2022-01-02 15:00:00"),
    "trailing commas in the header": (rows(HOURS, "{t},{i}.5,{i},", "date,a,b,"), "a b", 0.5, None, None),
    "utf-8 with a mark": (b"\xef\xbb\xbf" + rows(HOURS).encode(), "a b", 0.5, "2022-01-01 00:00:00", None),
    "utf-16": (rows(HOURS, "{t}\t{i}.5\t{i}", "date\tä\tb").encode("utf-16"), "ä b", 0.5, "2022-01-01 00:00:00", None),
    "utf-16, big end": (b"\xfe\xff" + rows(HOURS).encode("utf-16-be"), "a b", 0.5, "2022-01-01 00:00:00", None),
    "latin-1": (rows(HOURS, header="date,Wärme,b").encode("latin-1"), "Wärme b", 0.5, "2022-01-01 00:00:00", None),
    "one column": (rows(HOURS, "{i}.5", "a"), "a", 0.5, None, None),
    "unnamed index of dates": (rows(HOURS, header=",a,b"), "a b", 0.5, "2022-01-01 00:00:00", "2022-01-02 15:00:00"),
    "another name": (rows(HOURS, header="Zeit,a,b"), "a b", 0.5, "2022-01-01 00:00:00", "2022-01-02 15:00:00"),
    "ds": (rows(HOURS, header="ds,a,b"), "a b", 0.5, "2022-01-01 00:00:00", "2022-01-02 15:00:00"),
    "newest first": (rows(HOURS[::-1]), "a b", 39.5, "2022-01-01 00:00:00", "2022-01-02 15:00:00"),
    "numbers that are no times": (rows(range(40)), "a b", 0.5, None, None),
}
#: how times are written, and what the first and the last one are.
TIMES: dict[str, tuple[list[Any], str, str]] = {
    "days up to 31": (written(pd.date_range("2020-01-01", periods=40), "%d/%m/%Y"), "2020-01-01", "2020-02-09"),
    "american": (written(HOURS, "%m/%d/%Y %I:%M %p"), "2022-01-01", "2022-01-02 15:00"),
    "short american": (
        [f"{t.month}/{t.day}/{t:%y}" for t in pd.date_range("2020-01-22", periods=30)],
        "2020-01-22",
        "2020-02-20",
    ),
    "monthly, day first": (written(MONTHS, "%d.%m.%Y"), "2010-01-01", "2012-06-01"),
    "monthly, month first": (written(MONTHS, "%m/%d/%Y"), "2010-01-01", "2012-06-01"),
    "two digits": (written(pd.date_range("2020-01-01", periods=40), "%d.%m.%y"), "2020-01-01", "2020-02-09"),
    "month and year": (written(MONTHS, "%b-%y"), "2010-01-01", "2012-06-01"),
    "whole names": (written(MONTHS, "%B %Y"), "2010-01-01", "2012-06-01"),
    "month/year": (written(MONTHS, "%m/%Y"), "2010-01-01", "2012-06-01"),
    "quarters": (["2019Q4", "2020Q1", "2020Q2"], "2019-10-01", "2020-04-01"),
    "english": (written(HOURS, "%d %b %Y %H:%M"), "2022-01-01", "2022-01-02 15:00"),
    "mail": (written(HOURS, "%a, %d %b %Y %H:%M:%S GMT"), "2022-01-01", "2022-01-02 15:00"),
    "c": (written(HOURS, "%a %b %d %H:%M:%S %Y"), "2022-01-01", "2022-01-02 15:00"),
    "dots, year first": (written(HOURS, "%Y.%m.%d %H:%M"), "2022-01-01", "2022-01-02 15:00"),
    "slashes, year first": (["2002/1/1 0:00", "2002/1/8 0:00", "2002/1/15 0:00"], "2002-01-01", "2002-01-15"),
    "hour 24": (["31.12.2020 23:00", "31.12.2020 24:00", "01.01.2021 01:00"], "2020-12-31 23:00", "2021-01-01 01:00"),
    "20220101": (written(pd.date_range("2022-01-01", periods=40), "%Y%m%d"), "2022-01-01", "2022-02-09"),
    "20220101 as a number": ([20220101, 20220102, 20220103], "2022-01-01", "2022-01-03"),
    "2022010123": ([2022010122, 2022010123, 2022010200], "2022-01-01 22:00", "2022-01-02"),
    "years": ([2019, 2020, 2021], "2019-01-01", "2021-01-01"),
    "seconds": ([1640995200, 1640998800, 1641002400], "2022-01-01", "2022-01-01 02:00"),
    "seconds as text": (["1640995200", "1640998800", "1641002400"], "2022-01-01", "2022-01-01 02:00"),
    "parts of seconds": ([1640995200.5, 1640995201.0, 1640995201.5], "2022-01-01 00:00:00.5", "2022-01-01 00:00:01.5"),
    "milliseconds": ([1640995200000, 1640998800000], "2022-01-01", "2022-01-01 01:00"),
    "microseconds": ([1640995200000000, 1640998800000000], "2022-01-01", "2022-01-01 01:00"),
    "nanoseconds": ([1640995200000000000, 1640998800000000000], "2022-01-01", "2022-01-01 01:00"),
    "dates": ([date(2020, 1, 1), date(2020, 1, 2)], "2020-01-01", "2020-01-02"),
}
REFUSED: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "a row too long": (rows(HOURS) + "2022-01-03,1,2,3\n", {}, r"line 42 has 4 fields, but the header names 3 columns"),
    "a row too short": (rows(HOURS) + "2022-01-03,1", {}, r"line 42 has 2 fields"),
    "too long and quoted": (rows(HOURS, '"{t}",{i},{i}') + '"2022, Jan 3",1,2,3\n', {}, r"line 42 has 4 fields"),
    "a stray quote": (rows(HOURS) + '"2022-01-03,1,2\n2022-01-04,1,2\n', {}, r"line 43 has 1 fields"),
    "a name missing": (rows(HOURS, "{i},{t},{i}.5,{i}"), {}, r"every row has 4 fields, but the header names 3 columns"),
    "two separators": (
        "Zeit;a, kW\n" + "2022-01-01;1,5\n" * 3,
        {},
        r"separator is ambiguous: ',' or ';' would fit; choose one with data\.separator",
    ),
    "two decimal marks": ("date;a;b\n2022-01-01;1,5;2.5\n", {}, r"both '1,5' and '2\.5'; set data\.decimal"),
    "excel's first line": ("sep=;\ndate;a\n2022-01-01;1\n", {}, r"first line is 'sep=;'.*remove that line"),
    "excel": (b"PK\3\4" + bytes(40), {}, r"Excel workbook.*save a workbook as CSV"),
    "parquet": (b"PAR1" + bytes(40), {}, r"rename it to \.parquet"),
    "a web page": ("\n<!doctype html>\n<html>", {}, r"a web page"),
    "git lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", {}, r"git lfs pull"),
    "no utf-16 mark": (rows(HOURS).encode("utf-16-le"), {}, r"zero bytes.*save it as UTF-8"),
    "half an utf-16": (rows(HOURS).encode("utf-16")[:-1], {}, r"invalid utf-16"),
    "another code page": (b"date,a\n2022-01-01,1\n" + b"\x81\x8d\n", {}, r"neither UTF-8 nor Windows-1252"),
    "latin-1 at its end": (rows(HOURS).encode() + b"2022-01-03,1,\xb5\n", {}, r"line 42 of the file\) contains 'µ'"),
    "thousands": ("date;a\n2022-01-01;1,234.5\n2022-01-02;1,5\n", {}, r"'a' is not numeric.*'1,234\.5'"),
    "a late decimal comma": (rows(HOURS, '{t},"{i},5",1'), {}, r"'0,5'; if the comma is its decimal mark"),
    "ambiguous": (
        rows(["01/02/2020", "01/03/2020", "05/06/2020"]),
        {},
        r"can be read as day, month, year \(data\.time_format=dmy\) or month",
    ),
    "ambiguous days": (rows([f"{d:02}.03.2020" for d in range(1, 13)]), {}, r"=dmy\) or month, day, year"),
    "no such day": (rows(["30/01/2020", "30/02/2020", "30/03/2020"]), {}, r"line 3 of .*'30/02/2020' is not a date"),
    "day and month": (rows(["19-Dec", "20-Dec", "21-Dec"]), {}, r"'19-Dec' is not a date.*data\.time_format"),
    "some with a zone": (rows(["2020-01-01 00:00", "2020-01-01 01:00+01:00"]), {}, r"has no UTC offset"),
    "another format": (rows(HOURS), {"time_format": "%d/%m/%Y"}, r"'2022-01-01 00:00:00' is not a date"),
    "no format": (rows(HOURS), {"time_format": "%Q"}, r"data\.time_format='%Q'"),
    "the same code twice": (rows(HOURS), {"time_format": "%d %d"}, r"data\.time_format='%d %d'"),
    "two ways": (rows([*written(DAYS, "%d/%m/%Y"), "2020-02-21"]), {}, r"'2020-02-21' is not a date"),
    "names of months": (rows(["12 abc 20", "12 abc 21"], "{t},{i}", "code,a"), {}, r"'code' is not numeric"),
    "codes": (rows(["1234-56", "1234-57"], "{t},{i}", "code,a"), {}, r"'code' is not numeric"),
    "no code": (rows(HOURS), {"time_format": "d/m/y"}, r"data\.time_format='d/m/y'.*codes such as"),
    "no separator": (
        rows(HOURS),
        {"separator": "colon"},
        r"data\.separator='colon': must be one character .* or one of comma",
    ),
    "no decimal mark": (rows(HOURS), {"decimal": "'"}, r"data\.decimal"),
    "one mark for both": (rows(HOURS), {"separator": ",", "decimal": ","}, r"cannot be both"),
    "appended twice": (rows([*HOURS, *HOURS[10:20]]), {}, r"10 repeated .* 10:00:00 is in row 10 .*row 40 "),
    "no way with repeats": (rows(HOURS), {"duplicates": "first"}, r"data\.duplicates='first': must be one of error"),
    "dates in a second column": (rows(HOURS, "{i},{t},{i}", "a,when,b"), {}, r"set data\.time_column=when"),
}


def put(folder: Path, content: str | bytes) -> Path:
    file = folder / "t.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize("name", READ)
def test_is_read(name: str, tmp_path: Path) -> None:
    content, columns, value, first, last = READ[name]
    file = put(tmp_path, content)
    found = read_table(file)
    assert found.columns == columns.split("|" if "|" in columns else None)
    assert found.values[0, 0] == value
    for row, time in ((0, first), (-1, last)):
        if time is not None:
            assert found.stamps is not None
            assert found.stamps[row] == np.datetime64(time)
    if name == "numbers that are no times":
        assert found.stamps is None
    report = describe_table(file)  # the same door
    assert [column.name for column in report.columns] == found.columns
    assert {column.kind for column in report.columns} == {"number"}


@pytest.mark.parametrize("name", TIMES)
def test_times(name: str) -> None:
    times, first, last = TIMES[name]
    column = pd.Series(times)
    reading = find_reading(column, "t.csv")
    assert reading is not None
    found = reading.stamps(column)
    assert (found[0], found[-1]) == (np.datetime64(first), np.datetime64(last))
    assert (np.diff(found).astype(np.int64) > 0).all()


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str, tmp_path: Path) -> None:
    content, options, message = REFUSED[name]
    with pytest.raises(UserError, match=rf"(?s){message}"):
        read_table(put(tmp_path, content), form=TableFormat(**options))


def test_what_is_said_wins(tmp_path: Path) -> None:
    ambiguous = put(tmp_path, rows(["01/02/2020", "01/03/2020", "05/06/2020"]))
    for code, first in (("%d/%m/%Y", "2020-02-01"), ("%m/%d/%Y", "2020-01-02"), ("dmy", "2020-02-01")):
        stamps = read_table(ambiguous, form=TableFormat(time_format=code)).stamps
        assert stamps is not None
        assert stamps[0] == np.datetime64(first)
    commas = put(tmp_path, "Zeit;a, kW\n" + "".join(f"2022-01-0{n};{n},5\n" for n in range(1, 9)))
    found = read_table(commas, form=TableFormat(separator="semicolon"))
    assert (found.columns, found.values[0, 0]) == (["a, kW"], 1.5)
    numbers = put(tmp_path, rows([0, 3600, 7200]))
    stamps = read_table(numbers, form=TableFormat(time_format="s")).stamps
    assert stamps is not None
    assert stamps[1] == np.datetime64("1970-01-01 01:00")
    assert read_table(put(tmp_path, rows(HOURS)), time_column="none", columns=["a"]).stamps is None


def test_packed_csvs(tmp_path: Path) -> None:
    packers: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    for suffix, packer in packers.items():
        file = tmp_path / f"t.csv{suffix}"
        file.write_bytes(packer.compress(rows(HOURS).encode()))
        assert read_table(file).values[:, 1].tolist() == list(range(40))
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(UserError, match="cannot be read as a table"):
            read_table(file)


def test_numbers_that_are_infinite_are_no_times(tmp_path: Path) -> None:
    assert read_table(put(tmp_path, rows([2010, "inf", 2012]))).stamps is None


def test_repeated_times(tmp_path: Path) -> None:
    lines = rows([*HOURS[:3], HOURS[1], HOURS[1]], "{t},{i},{i}").splitlines()
    lines[-1] = lines[-1].rsplit(",", 1)[0] + ","  # a hole
    file = put(tmp_path, "\n".join(lines))

    def read(duplicates: str) -> Any:
        return read_table(file, missing="mask", form=TableFormat(duplicates=duplicates)).values.T.tolist()

    assert read("keep_first") == [[0, 1, 2], [0, 1, 2]]
    assert np.array_equal(read("keep_last"), [[0, 4, 2], [0, np.nan, 2]], equal_nan=True)
    assert np.allclose(read("mean"), [[0, 8 / 3, 2], [0, 2, 2]])
    assert read("keep_all")[0] == [0, 1, 2, 3, 4]
    report = describe_table(file)
    assert (report.duplicates, report.irregular, report.backward, report.step) == (2, 0, 1, "0 days 01:00:00")


def test_an_hour_that_comes_twice_in_local_time(tmp_path: Path) -> None:
    local = pd.date_range("2023-10-28 22:00", periods=24, freq="15min", tz="UTC").tz_convert("Europe/Berlin")
    file = put(tmp_path, rows(local.tz_localize(None)))
    assert describe_table(file).duplicates == 4
    found = read_table(file, form=TableFormat(duplicates="keep_all"))
    assert found.values[:, 1].tolist() == list(range(24))
    back = put(tmp_path, rows(local.tz_localize(None)[::-1]))
    assert read_table(back, form=TableFormat(duplicates="keep_all")).values[:, 1].tolist() == list(range(24))[::-1]


def test_no_step_of_a_calendar_is_irregular() -> None:
    def odd(stamps: pd.DatetimeIndex) -> tuple[int, int, int]:
        found = regularity(stamps.to_numpy().astype("datetime64[us]"))
        return found.duplicates, found.irregular, found.backward

    for freq in ("h", "MS", "ME", "QS", "B", "W"):
        assert odd(pd.date_range("2020-01-01", periods=50, freq=freq)) == (0, 0, 0)
    days = pd.date_range("2023-10-20", periods=30, tz="Europe/Berlin")
    utc = days.tz_convert("UTC").tz_localize(None).to_numpy()
    assert regularity(utc).irregular == 1
    assert regularity(utc, "Europe/Berlin").irregular == 0
    assert odd(HOURS[::-1]) == (0, 0, 39)
    assert odd(HOURS.delete(7)) == (0, 1, 0)


def test_the_zone_is_kept(tmp_path: Path) -> None:
    berlin = pd.date_range("2023-10-28", periods=72, freq="h", tz="Europe/Berlin")
    text = read_table(put(tmp_path, rows([time.isoformat() for time in berlin])))
    pd.DataFrame({"date": berlin, "a": 1.0}).to_parquet(tmp_path / "t.parquet")
    parquet = read_table(tmp_path / "t.parquet")
    assert (text.zone, parquet.zone) == ("+01:00", "Europe/Berlin")
    for found in (text, parquet):
        assert found.stamps is not None
        assert (found.stamps == berlin.tz_convert("UTC").tz_localize(None).to_numpy()).all()
        assert (shown(found.stamps, found.zone) == berlin).all()
    made = Forecast(["a"], np.zeros((2, 1), np.float32), np.zeros((1, 1), np.float32), None, text.stamps, text.zone)
    assert "2023-10-30 22:00:00+01:00" in made.table().to_csv()
    assert describe_table(tmp_path / "t.csv").last == "2023-10-30 22:00:00+01:00"


def test_times_in_the_index_of_a_parquet_file(tmp_path: Path) -> None:
    values = pd.DataFrame({"a": np.arange(40.0)}, index=HOURS)
    for name in (None, "when", "a"):
        values.rename_axis(name).to_parquet(tmp_path / "t.parquet")
        found = read_table(tmp_path / "t.parquet")
        assert found.columns == ["a"]
        assert (found.stamps is None) == (name == "a")  # a column of that name is there
        if name != "a":
            assert found.stamps is not None
            assert found.stamps[-1] == np.datetime64("2022-01-02 15:00")


def long(times: list[str], line: str = "{n},{t},{i}.5", header: str = "unique_id,ds,y") -> str:
    return header + "\n" + "".join(line.format(n=n, t=t, i=i) + "\n" for n in "xy" for i, t in enumerate(times))


HOURLY = [str(time) for time in HOURS]
#: content of a long table, and the first time.
PANELS: dict[str, tuple[str | bytes, str]] = {
    "nixtla": (long(HOURLY), "2022-01-01"),
    "german": (long(written(HOURS, "%d.%m.%Y %H:%M"), "{n};{t};{i},5", "id;Datum;y"), "2022-01-01"),
    "monthly": (long(written(MONTHS, "%d.%m.%Y"), header="id,date,y"), "2010-01-01"),
    "trailing": (long(HOURLY, "{n},{t},{i}.5,", header="id,date,y"), "2022-01-01"),
    "trailing in the header": (long(HOURLY, "{n},{t},{i}.5,", header="id,date,y,"), "2022-01-01"),
    "unnamed": (long(HOURLY, "{t},{n},{i}.5", header=",id,y"), "2022-01-01"),
    "utf-16": (long(HOURLY, "{n}\t{t}\t{i}.5", header="id\tdate\ty").encode("utf-16"), "2022-01-01"),
    "latin-1": (long(HOURLY, "ä{n},{t},{i}.5", header="id,date,y").encode("latin-1"), "2022-01-01"),
    "20220101": (long(written(pd.date_range("2022-01-01", periods=40), "%Y%m%d"), header="id,date,y"), "2022-01-01"),
    "seconds": (long([str(1640995200 + 3600 * n) for n in range(40)], header="id,date,y"), "2022-01-01"),
    "years": (long([str(1980 + n) for n in range(40)], header="id,date,y"), "1980-01-01"),
}


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_is_read_through_the_same_door(name: str, tmp_path: Path) -> None:
    content, first = PANELS[name]
    prepare_panel(put(tmp_path, content), tmp_path / "p", split=SplitRule("ratio", parts=(0.6, 0.2, 0.2)))
    panel = open_panel(tmp_path / "p")
    assert panel.columns == ["y"]
    assert panel.ids.tolist() in (["x", "y"], ["äx", "äy"])
    assert panel.series(1)[:3, 0].tolist() == [0.5, 1.5, 2.5]
    stamps = panel.stamps(0, 0, 1)
    assert stamps is not None
    assert stamps[0] == np.datetime64(first)


def test_panels_that_are_refused(tmp_path: Path) -> None:
    days = [f"{day:02}/03/2020" for day in range(1, 13)]
    for content, options, message in (
        (long(days), {"time_column": "ds"}, r"'01/03/2020' can be read as .*--time-format"),
        (long([*HOURLY[:9], "soon"]), {}, r"'soon' is not a date"),
        (long([str(n) for n in range(1, 9)]), {"time_column": "ds"}, r"is not a date|contains numbers, not dates"),
        (long(HOURLY) + "x,2023-01-01,1,2\n", {}, r"line 82 has 4 fields"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_panel(
                put(tmp_path, content), tmp_path / "p", split=SplitRule("ratio", parts=(0.6, 0.2, 0.2)), **options
            )
        assert not (tmp_path / "p").exists()
    form = TableFormat(time_format="%d/%m/%Y")
    prepare_panel(put(tmp_path, long(days)), tmp_path / "p", split=SplitRule("last", last=(2, 2)), form=form)
    stamps = open_panel(tmp_path / "p").stamps(0, 0, 2)
    assert stamps is not None
    assert stamps[1] == np.datetime64("2020-03-02")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("2021-12-31 23:00:00,0.5,1", r"first line \(2021-12-31 23:00:00, 0\.5, 1\) is used as the column names"),
        ("1,2.5,3", "is used as the column names"),
        ("date,a,a", "several columns are named a"),
        ("date,1,2", None),
        ("0,1,2", None),
        ("id,0.1,0.9", None),
    ],
)
def test_odd_headers_are_questioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, header: str, message: str | None
) -> None:
    with caplog.at_level("WARNING", "mmtrain"):
        describe_table(put(tmp_path, rows(HOURS, header=header)))
    assert re.search(message or "^$", caplog.text)


def test_a_panel_keeps_the_zone(tmp_path: Path) -> None:
    times = [f"{time}+02:00" for time in HOURS]
    file = put(tmp_path, long(times, header="id,date,y"))
    prepare_panel(file, tmp_path / "p", split=SplitRule("last", last=(5, 5)))
    panel = open_panel(tmp_path / "p")
    stamps = panel.stamps(0, 0, 1)
    assert panel.zone == "+02:00"
    assert stamps is not None
    assert str(shown(stamps, panel.zone)[0]) == "2022-01-01 00:00:00+02:00"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_sample_of_a_long_text_is_whole_lines(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(dialect, "_BLOCK", 64)
    text = rows(HOURS, end=end)
    found = dialect._sample(io.BytesIO(text.encode()), "utf-8", "t.csv")
    assert text.startswith(found)
    assert found.endswith(end[-1])
    assert 1 <= len(found.split()) < len(text.split())
