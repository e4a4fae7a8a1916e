"""Series: faults in tables, benchmark splits, scaling from training rows, windows against plain slicing."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.data.core.source import Source
from mmtrain.data.series.describe import describe_table
from mmtrain.data.series.files import TableFormat
from mmtrain.data.series.split import Scaler, Split, SplitRule, guess_split
from mmtrain.data.series.table import read_table
from mmtrain.data.series.table_source import SeriesWindows, load_series
from mmtrain.errors import UserError


def frame(rows: int = 60, **columns: Any) -> pd.DataFrame:
    made: dict[str, Any] = {"date": pd.date_range("2020-01-01", periods=rows, freq="h")}
    made |= {"a": np.arange(rows) * 1.0, "b": np.cos(np.arange(rows)), **columns}
    return pd.DataFrame(made)


def csv(folder: Path, table: pd.DataFrame, name: str = "t.csv") -> Path:
    table.to_csv(folder / name, index=False)
    return folder / name


def holed(**at: list[int]) -> pd.DataFrame:
    table = frame(10)
    for name, rows in at.items():
        table.loc[rows, name] = np.nan
    return table


def test_csv_parquet_and_zip_read_the_same(tmp_path: Path) -> None:
    table = frame()
    first = csv(tmp_path, table)
    table.to_parquet(tmp_path / "t.parquet")
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.write(first, "inside.csv")
    expected = table[["a", "b"]].to_numpy()
    for suffix in ("csv", "parquet", "zip"):
        read = read_table(tmp_path / f"t.{suffix}")
        assert read.columns == ["a", "b"]
        assert read.values.dtype == np.float64
        assert np.array_equal(read.values, expected)
        assert read.stamps is not None
        assert read.stamps[1] - read.stamps[0] == np.timedelta64(1, "h")
    assert read_table(first, columns=["b"]).values.shape == (60, 1)
    assert read_table(first, columns=["b", "a"]).columns == ["b", "a"]


def test_time_columns(tmp_path: Path) -> None:
    table = frame(5)
    renamed = csv(tmp_path, table.rename(columns={"date": "Timestamp"}))
    assert read_table(renamed, time_column=None).columns == ["a", "b"]
    assert read_table(renamed).stamps is not None
    named = csv(tmp_path, table.rename(columns={"date": "when"}), "w.csv")
    assert read_table(named, time_column="when").columns == ["a", "b"]
    with pytest.raises(UserError, match=r"no time column 'wen'; did you mean 'when'\?.*data\.time_column"):
        read_table(named, time_column="wen")
    bare = read_table(csv(tmp_path, table[["a", "b"]], "n.csv"))
    assert (bare.stamps, bare.columns) == (None, ["a", "b"])
    zones = csv(tmp_path, table.assign(date=table["date"].dt.tz_localize("UTC").astype(str)), "z.csv")
    assert (read_table(zones).stamps == table["date"].to_numpy()).all()
    broken = csv(tmp_path, table.assign(date=["2020-01-01", "soon", "2020-01-03", "2020-01-04", "2020-01-05"]), "b.csv")
    with pytest.raises(UserError, match=r"time column 'date', row 1 \(line 3 of the file\): 'soon' is not a date"):
        read_table(broken)


def test_text_is_named_with_its_row(tmp_path: Path) -> None:
    table = frame(4, c=["1", "2", "n/a?", "4"])
    with pytest.raises(
        UserError, match=r"t\.csv: column 'c' .*row 2 \(line 4 of the file\) contains 'n/a\?'.*data\.columns"
    ):
        read_table(csv(tmp_path, table))
    assert read_table(tmp_path / "t.csv", columns=["a"]).columns == ["a"]
    table.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column 'c' is not numeric: row 2 contains"):
        read_table(tmp_path / "t.parquet")


def test_missing_columns_get_a_suggestion(tmp_path: Path) -> None:
    file = csv(tmp_path, frame(4, oil_temperature=1.0))
    with pytest.raises(UserError, match=r"'oil_temprature' is not a column; did you mean 'oil_temperature'\?"):
        read_table(file, columns=["oil_temprature"])
    with pytest.raises(UserError, match="'date' is the time column"):
        read_table(file, columns=["date"])
    with pytest.raises(UserError, match="no column twice"):
        read_table(file, columns=["a", "a"])


def test_holes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = csv(tmp_path, holed(a=[3, 4, 9], b=[2]))
    with pytest.raises(
        UserError, match=r"column 'a' has 3 missing value\(s\).*row 3 \(line 5 of the file\).*data\.missing=ffill"
    ):
        read_table(file)
    with caplog.at_level(logging.WARNING, "mmtrain"):
        filled = read_table(file, missing="ffill")
    assert filled.values[:, 0].tolist() == [0, 1, 2, 2, 2, 5, 6, 7, 8, 8]
    assert filled.filled == 4
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: filled 4 missing value(s) in 2 column(s) (data.missing=ffill)"
    ]
    assert read_table(file, missing="interpolate").values[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert read_table(file, missing="zero").values[:, 0].tolist() == [0, 1, 2, 0, 0, 5, 6, 7, 8, 0]
    with pytest.raises(UserError, match="the first value of column 'a' is missing"):
        read_table(csv(tmp_path, holed(a=[0])), missing="ffill")
    with pytest.raises(UserError, match="contains no numbers"):
        read_table(csv(tmp_path, holed(a=list(range(10)))), missing="zero")
    with pytest.raises(UserError, match=r"data\.missing='fill'.*mean 'ffill'"):
        read_table(file, missing="fill")
    with pytest.raises(UserError, match="infinite"):
        read_table(csv(tmp_path, frame(4, c=[1.0, np.inf, 2.0, 1e39])))


def test_odd_stamps_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hours = pd.Timestamp("2020-01-01") + pd.to_timedelta([0, 1, 2, 2, 3, 7, 8, 9], unit="h")
    file = csv(tmp_path, pd.DataFrame({"date": hours, "a": np.arange(8.0)}))
    with caplog.at_level(logging.WARNING, "mmtrain"):
        assert len(read_table(file).values) == 8
    assert [record.getMessage().removeprefix(f"{file}: ") for record in caplog.records] == [
        "1 time step(s) differ from the usual 0 days 01:00:00; the rows are used as if they were evenly spaced",
        "1 repeated timestamp(s) (data.duplicates=keep_all)",
    ]
    assert len(read_table(file, form=TableFormat(duplicates="keep_first")).values) == 7
    report = describe_table(file)
    assert (report.rows, report.duplicates, report.irregular, report.step) == (8, 1, 1, "0 days 01:00:00")


def test_looking_names_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    csv(tmp_path / "deep", frame(5), "ETTh1.csv")
    frame(6).to_parquet(tmp_path / "weather.parquet")
    assert len(read_table("weather", data_root=tmp_path).values) == 6
    assert len(read_table("ETTh1.csv", data_root=tmp_path).values) == 5
    with pytest.raises(UserError, match=r"ETTh2: no such file .*deep|ETTh2: no such file .*mean 'ETTh1'"):
        read_table("ETTh2", data_root=tmp_path)
    monkeypatch.delenv("MMTRAIN_DATA", raising=False)
    with pytest.raises(UserError, match="MMTRAIN_DATA"):
        read_table("ETTh1")
    monkeypatch.setenv("MMTRAIN_DATA", str(tmp_path))
    assert len(read_table("ETTh1").values) == 5
    with pytest.raises(UserError, match="does not exist"):
        read_table("ETTh1", data_root=tmp_path / "none")


def test_unreadable_files(tmp_path: Path) -> None:
    for name, content in (("a.parquet", b"no"), ("b.zip", b"no"), ("c.csv", b""), ("d.csv", b"date,a\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: .*(cannot be read|no rows)"):
            read_table(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", "a\n1")
        archive.writestr("b.csv", "a\n1")
    with pytest.raises(UserError, match="contains 2 files"):
        read_table(tmp_path / "two.zip")


def test_benchmark_splits() -> None:
    assert Split.of("etth", 17420).borders == (8640, 11520, 14400)
    assert Split.of("ettm", 69680).borders == (34560, 46080, 57600)
    assert Split.of((0.7, 0.1, 0.2), 7588).borders == (int(7588 * 0.7), 7588 - int(7588 * 0.2), 7588)
    assert SplitRule("last", last=(0, 30))._last() == (0, 30)
    assert Split.of((0.7, 0.0, 0.3), 100).borders == (70, 70, 100)
    assert Split.of("etth", 17420).rows("test", 512, 96) == (11520 - 512, 14400)
    assert Split.of("etth", 17420).rows("train", 512, 96) == (0, 8640)
    assert [guess_split(name) for name in ("ETTh1", "ETTm2", "ettling", "weather")] == [
        SplitRule("etth"),
        SplitRule("ettm"),
        SplitRule("ratio", parts=(0.7, 0.1, 0.2)),
        SplitRule("ratio", parts=(0.7, 0.1, 0.2)),
    ]
    with pytest.raises(UserError, match="needs 14400 rows, but the table has 100"):
        Split.of("etth", 100)
    with pytest.raises(UserError, match=r"add up to 1"):
        Split.of((0.7, 0.2, 0.2), 100)
    with pytest.raises(UserError, match=r"data\.split='eth'.*mean 'etth'"):
        Split.of("eth", 100)


def test_the_benchmark_counts_of_windows(tmp_path: Path) -> None:
    pd.DataFrame({"a": np.arange(17420.0)}).to_parquet(tmp_path / "ETTh9.parquet")
    data = load_series("ETTh9", 512, 96, data_root=tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (8640 - 607, 2880 - 95, 2880 - 95)


def test_scaling_comes_from_the_training_rows_alone(tmp_path: Path) -> None:
    table = frame(100, c=5.1)
    table.loc[70:, ["a", "b"]] += 1e6
    data = load_series(csv(tmp_path, table), 8, 4, split=(0.7, 0.1, 0.2))
    train = table.loc[:69, ["a", "b", "c"]].to_numpy()
    assert data.scaler.mean == pytest.approx(train.mean(0), rel=1e-6)
    assert data.scaler.std == pytest.approx([*train.std(0)[:2], 1.0], rel=1e-6)
    assert data.train.values[:70].mean(0) == pytest.approx([0, 0, 0], abs=1e-5)
    assert data.scaler.inverse(data.train.values) == pytest.approx(data.table.values, rel=1e-5, abs=1e-5)
    again = Scaler.from_dict(json.loads(json.dumps(data.scaler.to_dict())))
    assert np.array_equal(again.mean, data.scaler.mean)
    assert np.array_equal(again.std, data.scaler.std)


@pytest.mark.parametrize(("offset", "step"), [(12345678.9, 0.05), (1e9, 0.01), (-3e6, 1e-4), (0.0, 1e-30)])
def test_what_a_counter_counts_is_not_lost_in_rounding(tmp_path: Path, offset: float, step: float) -> None:
    meter = offset + step * np.arange(700)
    data = load_series(csv(tmp_path, frame(700, meter=meter)), 8, 4, split=(0.7, 0.1, 0.2), columns=["meter"])
    assert len(np.unique(data.train.values)) == 700
    assert data.scaler.inverse(data.train.values)[:, 0] == pytest.approx(meter, rel=1e-15, abs=1e-4 * step * 700)
    saved = Scaler.from_dict(json.loads(json.dumps(data.assets()["scaler"])))
    assert (saved.mean == data.scaler.mean).all()
    assert (saved.std == data.scaler.std).all()


def test_rounding_noise_is_no_variation(tmp_path: Path) -> None:
    sums = np.array([0.1 + 0.2 if row % 2 else 0.3 for row in range(100)]) * 1e7
    data = load_series(csv(tmp_path, frame(100, c=sums)), 8, 4, split=(0.7, 0.1, 0.2), columns=["c"])
    assert data.scaler.std.tolist() == [1.0]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"mean": [0, 1], "std": [1, 0]}, "deviation at index 1 is 0.0"),
        ({"mean": [0, 1], "std": [1, -2]}, "deviation at index 1 is -2.0"),
        ({"mean": [0, 1], "std": [float("nan"), 1]}, "deviation at index 0 is nan"),
        ({"mean": [float("inf"), 1], "std": [1, 1]}, "mean at index 0 is inf"),
        ({"mean": [0, 1], "std": [1]}, r"means have shape \(2,\), the deviations \(1,\)"),
        ({"mean": [0, 1]}, "KeyError"),
        ({"mean": [0, 1], "std": ["a", 1]}, "ValueError"),
    ],
)
def test_a_damaged_scaler_is_refused(saved: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"run/assets\.json: the scaler is damaged.*{message}"):
        Scaler.from_dict(saved, "run/assets.json")


def test_splits_meet_without_a_gap(tmp_path: Path) -> None:
    data = load_series(csv(tmp_path, frame(100)), 8, 4, split=(0.7, 0.1, 0.2))
    a = data.scaler.mean[0]
    for windows, first, last in ((data.train, 8, 70), (data.val, 70, 80), (data.test, 80, 100)):
        batch = windows.fetch(np.arange(len(windows)), None)
        targets = data.scaler.inverse(batch["future"].numpy())[:, :, 0]
        assert targets.min() == pytest.approx(first, abs=1e-3)  # column a holds the number of the row
        assert targets.max() == pytest.approx(last - 1, abs=1e-3)
        assert len(windows) == last - first - 4 + 1
        assert windows.locate(np.array([0]))[1][0] == first
    assert a == pytest.approx(34.5)
    assert len(load_series(tmp_path / "t.csv", 8, 4, split=(0.7, 0.1, 0.2), stride=5).train) == (70 - 12) // 5 + 1


def test_too_short_says_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t\.csv: the val split has 10 of 100 rows .*lookback 8 \+ horizon 20"):
        load_series(csv(tmp_path, frame(100)), 8, 20, split=(0.7, 0.1, 0.2))
    with pytest.raises(UserError, match=r"lookback 90 \+ horizon 4"):
        load_series(tmp_path / "t.csv", 90, 4, split=(0.7, 0.1, 0.2))
    with pytest.raises(UserError, match=r"9 rows are too few .* = 10 rows"):
        SeriesWindows(np.zeros((9, 1), np.float32), 0, 9, 6, 4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_are_plain_slices(data: st.DataObject) -> None:
    lookback, horizon, stride = (data.draw(st.integers(1, 6)) for _ in range(3))
    start = data.draw(st.integers(0, 5))
    stop = start + lookback + horizon + data.draw(st.integers(0, 20))
    values = np.random.default_rng(0).normal(size=(stop + 3, 2)).astype(np.float32)
    windows = SeriesWindows(values, start, stop, lookback, horizon, stride)
    begins = range(start, stop - lookback - horizon + 1, stride)
    assert isinstance(windows, Source)
    assert (len(windows), windows.block_sizes) == (len(begins), [len(begins)])
    order = np.random.default_rng(1).permutation(len(begins))
    batch = windows.fetch(order, None)
    for place, number in enumerate(order.tolist()):
        begin = begins[number]
        assert np.array_equal(batch["past"][place], values[begin : begin + lookback])
        assert np.array_equal(batch["future"][place], values[begin + lookback : begin + lookback + horizon])
    batch["past"].zero_()  # a copy: the table stays as it is
    assert values.any()
    with pytest.raises(IndexError):
        windows.fetch(np.array([len(windows)]), None)
