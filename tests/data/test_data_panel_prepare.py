"""Preparing panels: all layouts give the same arrays, faults are named, and what is there is complete."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mmtrain.cli.data import app
from mmtrain.data.prepare.panel import prepare_panel
from mmtrain.data.series.panel import Panel, open_panel
from mmtrain.data.series.panel_inputs import fit_scalers, pack, unpack
from mmtrain.data.series.split import SplitRule
from mmtrain.errors import UserError
from tests.data.panels import LAST, long_frame, opened, prepared, write

RATIO = SplitRule("ratio", parts=(0.7, 0.1, 0.2))


def same(one: Panel, other: Panel) -> bool:
    """The same series with the same rows, whatever their order and their shards."""
    rank = {name: number for number, name in enumerate(other.ids.tolist())}
    return sorted(one.ids.tolist()) == sorted(rank) and all(
        np.array_equal(one.series(n), other.series(rank[name]), equal_nan=True)
        and str(one.stamps(n, 0, 3)) == str(other.stamps(rank[name], 0, 3))
        for n, name in enumerate(one.ids.tolist())
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.randoms(use_true_random=False), st.data())
@pytest.mark.slow
def test_long_wide_and_files_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], random: Any, draw: st.DataObject
) -> None:
    lengths = [*lengths, 12]
    frame = long_frame(lengths)[["id", "date", "y"]]
    holes = draw.draw(st.lists(st.integers(0, len(frame) - 1), max_size=3))
    frame.loc[[row for row in holes if frame["id"].duplicated()[row]], "y"] = np.nan
    if frame["y"].notna().groupby(frame["id"]).sum().min() == 0:
        return
    here = tmp_path_factory.mktemp("layouts")
    order = list(range(len(frame)))
    random.shuffle(order)
    wide = frame.pivot(index="id", columns="date", values="y")
    wide.columns = [f"{date:%Y-%m-%d}" for date in wide.columns]
    (here / "files").mkdir()
    (here / "two").mkdir()
    for number, (name, part) in enumerate(frame.groupby("id")):
        write(part.drop(columns="id"), here / "files" / f"{name}.{'csv' if number % 2 else 'parquet'}")
    write(frame.iloc[order[::2]], here / "two" / "a.csv")
    write(frame.iloc[order[1::2]], here / "two" / "b.parquet")
    sources = {
        "long": write(frame, here / "long.csv"),
        "shuffled": write(frame.iloc[order], here / "shuffled.parquet"),
        "wide": write(wide.reset_index(), here / "wide.csv"),
        "files": here / "files",
        "folder of long": here / "two",
    }
    made = {
        name: open_panel(prepare_panel(root, here / f"out {name}", split=RATIO, step="D").out)
        for name, root in sources.items()
    }
    assert sum(made["long"].lengths.tolist()) <= sum(lengths)
    assert all(same(panel, made["long"]) for panel in made.values())


def test_rows_in_any_order_and_without_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = long_frame([20, 15]).sample(frac=1, random_state=1)
    with caplog.at_level(logging.INFO, "mmtrain"):
        done = prepare_panel(write(frame, tmp_path / "t.csv"), tmp_path / "out", split=RATIO, columns=["y"])
    assert "rows are out of order in their series" in caplog.text
    panel = open_panel(done.out)
    assert str(panel.timeline and panel.timeline.step) == "1D"
    rows = {name: number for number, name in enumerate(panel.ids.tolist())}
    assert panel.series(rows["s1"])[:, 0].tolist() == [1000.0 + row for row in range(15)]


def test_known_static_and_rows_ahead(tmp_path: Path) -> None:
    done = prepared(tmp_path, [20, 12], ahead=5)
    counts = done.meta["counts"]
    assert (counts["series"], counts["rows"], counts["ahead"], counts["shortest"], counts["longest"]) == (
        2,
        32,
        10,
        12,
        20,
    )
    panel = open_panel(done.out)
    assert (panel.lengths.tolist(), panel.rows.tolist(), panel.first.tolist()) == ([20, 12], [25, 17], [0, 1])
    assert panel.known[0][:25, 0].tolist() == list(range(25))
    assert panel.categories == {"kind": ["a", "b"]}
    assert panel.statics["kind"].tolist() == [0, 1]
    assert panel.statics["size"].tolist() == [0.0, 1.5]
    stamps = panel.stamps(1, 0, 2)
    assert stamps is not None
    assert stamps.astype("datetime64[D]").astype(str).tolist() == ["2024-01-02", "2024-01-03"]


def test_static_columns_may_have_holes(tmp_path: Path) -> None:
    frame = long_frame([90, 80])
    frame.loc[frame["id"] == "s1", ["kind", "size"]] = [None, np.nan]
    for suffix in ("csv", "parquet"):
        file = write(frame.sample(frac=1, random_state=0), tmp_path / f"t.{suffix}")
        prepare_panel(file, tmp_path / suffix, split=LAST, columns=["y"], static=["kind", "size"])
        data = opened(tmp_path / suffix, static=["size"])
        row = data.panel.ids.tolist().index("s1")
        assert np.isnan(data.panel.statics["size"][row])
        assert data.inputs.static.tolist() == [[0.0], [0.0]]  # one number, and the mean in place of the other


def test_a_calendar_shared_by_all(tmp_path: Path) -> None:
    frame = long_frame([20, 12])[["id", "date", "y"]]
    dates = pd.date_range("2023-12-25", periods=60, freq="D")
    days = pd.DataFrame({"date": dates, "holiday": (np.arange(60) % 9 == 0) * 1.0, "hot": np.arange(60.0)})
    calendar = write(days, tmp_path / "days.csv")
    file = write(frame, tmp_path / "t.csv")
    prepare_panel(file, tmp_path / "p", split=LAST, calendar=calendar)
    data = opened(tmp_path / "p", known=["hot", "holiday"], calendar=True)
    assert data.inputs.names[-2:] == ["hot", "holiday"]
    batch = data.train.fetch(np.array([0, len(data.train) - 1]), None)
    first = [int(x[0]) for x in data.train.locate(np.array([len(data.train) - 1]))]
    begin = 7 + int(data.panel.first[first[0]]) + first[1] - 6
    hot = batch["known"][1, :, 0, -2].numpy() * data.inputs.std[0] + data.inputs.mean[0]
    assert hot == pytest.approx(np.arange(begin, begin + 9), abs=1e-4)
    assert batch["known"][1, :, 0, -1].tolist() == [float(day % 9 == 0) for day in range(begin, begin + 9)]
    write(days.drop(index=10), calendar)
    with pytest.raises(UserError, match=r"days\.csv: there is no row for 2024-01-04"):
        prepare_panel(file, tmp_path / "q", split=LAST, calendar=calendar)
    write(days[:20], calendar)
    with pytest.raises(UserError, match=r"covers 13 time steps .* need 20"):
        prepare_panel(file, tmp_path / "q", split=LAST, calendar=calendar)


def test_the_scaler_of_shared_columns_sees_training_rows_only(tmp_path: Path) -> None:
    frame = long_frame([20, 12])[["id", "date", "y"]]
    scalers = []
    for spoilt in (0.0, 1e6):
        days = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=40, freq="D"), "hot": np.arange(40.0)})
        days.loc[days.index >= 12, "hot"] += spoilt  # series 0 trains on 12 days, series 1 on the 2nd to the 5th
        folder = tmp_path / str(spoilt)
        file, calendar = write(frame, folder / "t.csv"), write(days, folder / "days.csv")
        prepare_panel(file, folder / "p", split=LAST, calendar=calendar)
        inputs = opened(folder / "p", known=["hot"], lookback=2, horizon=2).inputs
        fitted = fit_scalers(inputs.panel, np.array([12, 4]))
        assert (fitted.known.mean, fitted.known.std) == (inputs.mean, inputs.std)
        scalers.append((inputs.mean.item(), inputs.std.item()))
    assert scalers[0] == scalers[1] == pytest.approx((5.5, np.arange(12).std()))


def test_gaps_become_holes_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = long_frame([20, 12]).drop(index=[5, 6, 25])
    done = prepare_panel(write(frame, tmp_path / "t.csv"), tmp_path / "p", split=LAST, columns=["y"], known=["price"])
    assert (done.meta["counts"]["holes"], done.meta["counts"]["known_filled"]) == (3, 3)
    assert "3 time steps of 1D are missing, in 2 series" in caplog.text
    panel = open_panel(done.out)
    assert np.flatnonzero(np.isnan(panel.series(0)[:, 0])).tolist() == [5, 6]
    assert panel.known[0][4:8, 0].tolist() == [4, 4, 4, 7]
    flat = prepare_panel(tmp_path / "t.csv", tmp_path / "q", split=LAST, columns=["y"], time_column=None)
    assert flat.meta["counts"]["rows"] == 29
    assert open_panel(flat.out).timeline is None


def test_repeated_and_odd_times_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = long_frame([20, 12])[["id", "date", "y"]]
    twice = pd.concat([frame, frame.iloc[[3]].assign(y=-1.0)])
    file = write(twice, tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"series 's0' has 2024-01-04T00:00:00 more than once .*--duplicates last"):
        prepare_panel(file, tmp_path / "p", split=LAST, step="D")
    done = prepare_panel(file, tmp_path / "p", split=LAST, step="D", duplicates="last")
    assert open_panel(done.out).series(0)[3, 0] == -1
    assert "1 repeated times within a series" in caplog.text
    frame.loc[7, "date"] += pd.Timedelta(hours=5)
    with pytest.raises(UserError, match=r"series 's0': 2024-01-08T05:00:00 is not a whole number of time steps of 1D"):
        prepare_panel(write(frame, tmp_path / "u.csv"), tmp_path / "q", split=LAST)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["p", "t.csv", "u.csv"]


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"known": ["prise"]}, r"--known prise: there is no such column; did you mean 'price'\?"),
    ({"id_column": "who"}, "--id who: there is no such column"),
    ({"time_column": "when"}, "--time when: there is no such column"),
    ({"columns": ["y", "kind"]}, "cannot be read as a table|column 'kind' is not numeric"),
    ({"columns": ["y"], "known": ["y"]}, "name a column twice"),
    ({"static": ["price"], "columns": ["y"]}, r"static column 'price' is not constant within series 's0'"),
    ({"columns": ["y"], "missing": "fill"}, r"--missing fill: must be one of keep, ffill.*mean 'ffill'"),
    ({"columns": ["y"], "step": "7 parsecs"}, r"--step 7 parsecs: must be a number and a unit"),
    ({"columns": ["y"], "step": "min"}, r"32 rows become .*, most of them without values"),
    ({"columns": ["y"], "start": "2020-01-01"}, "--start 2020-01-01: only for a wide panel"),
    ({"columns": ["y"], "split": SplitRule("last", last=(40, 40))}, "leaves no training rows in any series"),
    ({"columns": ["y"], "split": SplitRule("date", dates=("soon", "later"))}, "must be the first date of validation"),
    ({"columns": ["y"], "split": SplitRule("etth")}, "not possible for a panel; use ratio, date or last"),
    ({"columns": ["y"], "duplicates": "first"}, "--duplicates first: must be error or last"),
]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(("options", "message"), FAULTS)
def test_faults_are_named_and_leave_nothing(tmp_path: Path, options: dict[str, Any], message: str, suffix: str) -> None:
    file = write(long_frame([20, 12]), tmp_path / f"t.{suffix}")
    with pytest.raises(UserError, match=message):
        prepare_panel(file, tmp_path / "p", **{"split": LAST, **options})
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_files_that_are_no_panel(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        prepare_panel(tmp_path / "none", tmp_path / "p", split=LAST)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.csv or \.parquet file"):
        prepare_panel(tmp_path / "empty", tmp_path / "p", split=LAST)
    one = write(long_frame([20])[["date", "y"]], tmp_path / "one.csv")
    with pytest.raises(UserError, match=r"one\.csv: there is no id column .*data\.kind=series.*--id"):
        prepare_panel(one, tmp_path / "p", split=LAST)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"broken\.parquet: cannot be read as a table"):
        prepare_panel(tmp_path / "broken.parquet", tmp_path / "p", split=LAST)
    folder = tmp_path / "folder"
    write(long_frame([20])[["date", "y"]], folder / "a.csv")
    write(long_frame([20])[["date", "price"]], folder / "b.csv")
    with pytest.raises(UserError, match=r"b\.csv: columns y are missing; all files need the same columns"):
        prepare_panel(folder, tmp_path / "p", split=LAST)
    twice = pd.DataFrame({"id": ["a", "a"], "1": [1.0, 2.0], "2": [1.0, 2.0], "3": [3.0, 4.0]})
    with pytest.raises(UserError, match="1 ids are repeated, such as a"):
        prepare_panel(write(twice, tmp_path / "w.csv"), tmp_path / "p", split=RATIO)
    text = write(long_frame([20]).assign(y="much"), tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"text\.parquet: column 'y' is not numeric"):
        prepare_panel(text, tmp_path / "p", split=LAST, columns=["y"])
    dates = write(long_frame([20]).assign(date="soon"), tmp_path / "dates.csv")
    with pytest.raises(UserError, match=r"dates\.csv: time column 'date': 'soon' is not a date"):
        prepare_panel(dates, tmp_path / "p", split=LAST, columns=["y"])
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("layout", ["long", "shuffled", "wide"])
@pytest.mark.parametrize("freq", ["MS", "ME", "BME", "QE", "B", "W-FRI"])
def test_the_days_of_months_and_business_days_are_kept(tmp_path: Path, freq: str, layout: str) -> None:
    frame = long_frame([40, 30], freq=freq)[["id", "date", "y"]]
    if layout == "wide":
        frame = frame.pivot(index="id", columns="date", values="y")
        frame.columns = [f"{date:%Y-%m-%d}" for date in frame.columns]
        frame = frame.reset_index()
    elif layout == "shuffled":
        frame = frame.sample(frac=1, random_state=0)
    panel = open_panel(prepare_panel(write(frame, tmp_path / "t.csv"), tmp_path / "p", split=LAST).out)
    expected = pd.date_range("2024-01-01", periods=45, freq=freq).to_numpy()
    assert (panel.holes, panel.lengths.tolist()) == (0, [40, 30])
    for series in (0, 1):
        found = panel.stamps(series, 0, 42)  # two steps behind the end of the first
        assert found is not None
        assert (found == expected[series : series + 42]).all()


@pytest.mark.parametrize("order", ["long", "shuffled"])
@pytest.mark.parametrize(
    ("freq", "start"), [("h", "2023-10-27"), ("D", "2023-10-01"), ("B", "2024-03-01"), ("MS", "2022-01-01")]
)
def test_days_are_those_of_the_time_zone(tmp_path: Path, freq: str, start: str, order: str) -> None:
    """Over a change of daylight saving time: hours as they pass, days and months by the calendar."""
    times = pd.date_range(start, periods=90, freq=freq, tz="Europe/Berlin")
    frame = pd.concat([pd.DataFrame({"id": name, "date": times[:80], "y": np.arange(80.0)}) for name in "ab"])
    frame = frame.iloc[7:] if order == "long" else frame.iloc[7:].sample(frac=1, random_state=0)
    split = SplitRule("date", dates=tuple(str(times[row])[:10] for row in (50, 60)))
    pd.DataFrame({"date": times.tz_localize(None), "flag": np.arange(90.0)})[:: 1 if freq != "h" else 90].to_csv(
        tmp_path / "days.csv", index=False
    )
    calendar = None if freq == "h" else tmp_path / "days.csv"  # its hours would come twice
    source = write(frame, tmp_path / "t.parquet")
    panel = open_panel(prepare_panel(source, tmp_path / "p", split=split, calendar=calendar).out)
    assert panel.holes == 0
    for series in (0, 1):
        number = panel.ids.tolist().index("ab"[series])
        found = panel.stamps(number, 0, 75)
        skipped = 7 * (1 - series)
        expected = times[skipped : skipped + 75].tz_convert("UTC").tz_localize(None).to_numpy()
        assert (found == expected).all()
    borders = split.cut_panel(panel.lengths, panel.first, panel.timeline, panel.zone)
    first = [int(np.argmax(times >= pd.Timestamp(date, tz="Europe/Berlin"))) for date in split.dates]
    assert borders[panel.ids.tolist().index("b")].tolist() == [*first, 80]
    if calendar is not None:
        assert panel.shared[0, :, 0].tolist() == list(range(int(panel.shared[0, 0, 0]), 90))


def test_days_whose_utc_offset_changes_are_refused_with_the_cure(tmp_path: Path) -> None:
    days = pd.date_range("2023-10-01", periods=60, freq="D", tz="Europe/Berlin")
    frame = pd.DataFrame({"id": "a", "date": [day.isoformat() for day in days], "y": np.arange(60.0)})
    with pytest.raises(
        UserError, match=r"Days are counted in local time at \+01:00: if the UTC offset .* changes .* without an offset"
    ):
        prepare_panel(write(frame, tmp_path / "t.csv"), tmp_path / "p", split=LAST)


@pytest.mark.parametrize("layout", ["long", "wide", "files"])
def test_what_a_counter_counts_is_not_lost_in_rounding(tmp_path: Path, layout: str) -> None:
    frame = long_frame([90, 60])[["id", "date", "y"]]
    meter = frame["id"] == "s0"
    frame.loc[meter, "y"] = 12345678.9 + 0.05 * frame.loc[meter, "y"]
    source = tmp_path / "t.csv"
    if layout == "wide":
        wide = frame.pivot(index="id", columns="date", values="y")
        wide.columns = [f"{date:%Y-%m-%d}" for date in wide.columns]
        write(wide.reset_index(), source)
    elif layout == "files":
        source = tmp_path / "files"
        for name, part in frame.groupby("id"):
            write(part.drop(columns="id"), source / f"{name}.csv")
    else:
        write(frame, source)
    out = prepare_panel(source, tmp_path / "p", split=LAST).out
    panel = open_panel(out)
    assert panel.series(0)[:, 0].tolist() == frame.loc[meter, "y"].tolist()
    data = opened(out, 6, 3)
    windows = data.train.fetch(np.arange(len(data.train)), None)["past"]
    assert str(windows.dtype) == "torch.float32"
    first = windows[data.train.locate(np.arange(len(data.train)))[0] == 0]
    assert len(np.unique(first.numpy().round(4))) > 70  # all rows of the training windows are different values
    assets = json.loads(json.dumps(data.assets()))
    assert (unpack(assets["mean"]) == data.inputs.scalers.mean).all()
    for name, kept in (("scaler-std", 0.0), ("scaler-std", np.nan), ("scaler-mean", np.inf)):
        sound = np.load(out / f"{name}.npy")
        np.save(out / f"{name}.npy", np.full_like(sound, kept))
        with pytest.raises(
            UserError, match=r"scaler-mean\.npy and scaler-std\.npy are damaged.*prepare the panel again"
        ):
            opened(out, 6, 3)
        np.save(out / f"{name}.npy", sound)


def test_a_panel_is_stored_as_float32_where_that_is_enough(tmp_path: Path) -> None:
    """Prices in cents, constants and integers: rounding is far below what varies."""
    frame = long_frame([90, 60, 50])[["id", "date", "y"]]
    frame["price"] = 8.26 + 0.01 * (np.arange(len(frame)) % 20)
    frame["constant"] = 0.1
    frame["many"] = 1e7 + np.arange(len(frame))
    out = prepare_panel(write(frame, tmp_path / "t.csv"), tmp_path / "p", split=LAST).out
    assert [array.dtype for array in open_panel(out).values] == [np.float32]


def test_a_wide_panel_without_dates(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": ["a", "b"], "shop": ["x", "y"], **{f"d_{n}": [n, -n] for n in range(1, 21)}})
    frame.loc[1, ["d_1", "d_2", "d_20"]] = np.nan
    file = write(frame, tmp_path / "w.csv")
    done = prepare_panel(file, tmp_path / "p", split=LAST, static=["shop"])
    panel = open_panel(done.out)
    assert (panel.lengths.tolist(), panel.first.tolist(), panel.timeline) == ([20, 17], [0, 2], None)
    assert done.meta["counts"]["holes"] == 0
    dated = open_panel(
        prepare_panel(file, tmp_path / "q", split=LAST, static=["shop"], start="2011-01-29", step="D").out
    )
    assert str(dated.stamps(1, 0, 1)) == "['2011-01-31T00:00:00.000000']"
    with pytest.raises(UserError, match="--start and --step: give both"):
        prepare_panel(file, tmp_path / "r", split=LAST, static=["shop"], start="2011-01-29")


def test_a_finished_panel_is_left_alone(tmp_path: Path) -> None:
    done = prepared(tmp_path, [20, 12])
    before = {file: file.stat().st_mtime_ns for file in done.out.rglob("*")}
    options: dict[str, Any] = {"known": ["price"], "static": ["kind", "size"]}
    again = prepare_panel(tmp_path / "long.parquet", done.out, split=LAST, **options)
    assert not again.fresh
    assert {file: file.stat().st_mtime_ns for file in done.out.rglob("*")} == before
    with pytest.raises(UserError, match=r"prepared with split .*; give --force"):
        prepare_panel(tmp_path / "long.parquet", done.out, split=RATIO, **options)
    with pytest.raises(UserError, match="exists and is not a finished dataset"):
        prepare_panel(tmp_path / "long.parquet", tmp_path, split=LAST, **options)


def test_a_panel_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    out = prepared(tmp_path, [20, 12]).out
    meta = json.loads((out / "meta.json").read_text())
    for change, message in (
        ({"kind": "images"}, "not the meta.json of a prepared panel"),
        ({"format": 99}, "the panel has format 99, but format 1 is needed"),
        ({"columns": ["a", "b"]}, r"values-00000\.npy is float32 \(32, 1\), not float32 or float64 \(32, 2\)"),
        ({"shards": 0}, "does not match the number of series and shards"),
    ):
        (out / "meta.json").write_text(json.dumps({**meta, **change}))
        with pytest.raises(UserError, match=message):
            open_panel(out)
    (out / "meta.json").write_text(json.dumps(meta))
    np.save(out / "lengths.npy", np.array([20, 99]))
    with pytest.raises(UserError, match=r"lengths\.npy and rows\.npy do not match"):
        open_panel(out)
    np.save(out / "lengths.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"lengths\.npy: cannot be read .*allow_pickle"):
        open_panel(out)


def test_packing_is_exact() -> None:
    array = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    assert np.array_equal(unpack(json.loads(json.dumps(pack(array)))), array)
    with pytest.raises(ValueError, match=r"reshape|base64|Incorrect"):
        unpack({"shape": [3], "float32": pack(array)["float32"]})


def test_the_commands(tmp_path: Path) -> None:
    run = CliRunner()
    file = write(long_frame([20, 12, 30]), tmp_path / "t.csv")
    options = ["--root", str(file), "--out", str(tmp_path / "p"), "--known", "price", "--static", "kind, size"]
    done = run.invoke(app, ["prepare", "panel", *options, "--last", "4,4"])
    assert done.exit_code == 0, done.output
    assert "3 series of 12 to 30 rows, 62 in all, 1 shard(s); written" in done.output
    assert "nothing to do" in run.invoke(app, ["prepare", "panel", *options, "--last", "4,4"]).output
    for wrong, message in (
        (["--last", "4,4", "--dates", "a,b"], "give only one of --ratios"),
        (["--split", "weekly"], "choose ratio, date or last"),
        (["--last", "four"], "numbers separated by commas"),
        (["--split", "date"], "requires --dates A,B"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            run.invoke(app, ["prepare", "panel", *options, *wrong], catch_exceptions=False)
    for what, columns in ((tmp_path / "p", "y"), (file, "y, price, size")):
        shown = run.invoke(
            app, ["describe", str(what), "--plot", str(tmp_path / "x" / "p.png")], catch_exceptions=False
        )
        text = " ".join(shown.output.split())
        assert f"a panel of 3 series, 62 rows, columns {columns} rows per series: 12 to 30, median 20" in text
        assert "2024-01-01T00:00:00 to 2024-02-01T00:00:00, step 1D" in text
        assert "0 values missing, in 0 series; 0 constant series" in text
        assert ("known in advance: price static: kind (2 values), size (number)" in text) == (columns == "y")
        assert (tmp_path / "x" / "p.png").read_bytes()[:4] == b"\x89PNG"
