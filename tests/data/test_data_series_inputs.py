"""Tables with what is known in advance, masks, and splits by date or from the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from mmtrain.cli.data import app
from mmtrain.config import SeriesDataConfig, TSM2Config, load_config
from mmtrain.data.open import check_inputs, open_data
from mmtrain.data.series.split import SplitRule
from mmtrain.data.series.table import read_table
from mmtrain.data.series.table_source import load_series
from mmtrain.errors import UserError


def frame(rows: int = 60) -> pd.DataFrame:
    made = {"date": pd.date_range("2020-01-01", periods=rows, freq="h"), "a": np.arange(rows) * 1.0}
    return pd.DataFrame({**made, "b": np.cos(np.arange(rows)), "price": np.arange(rows) % 7 + 1.0, "sale": 0.0})


def csv(folder: Path, table: pd.DataFrame) -> Path:
    table.to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


def test_known_columns_are_inputs_and_no_targets(tmp_path: Path) -> None:
    table = frame()
    table.loc[::5, "sale"] = 1
    data = load_series(csv(tmp_path, table), 8, 4, split=(0.7, 0.1, 0.2), known=["price", "sale"], calendar=True)
    assert data.columns == ["a", "b"]
    assert data.inputs.names == ["hour", "weekday", "day", "yearday", "month", "price", "sale"]
    batch = data.test.fetch(np.arange(3), None)
    assert batch["known"].shape == (3, 12, 2, 7)
    assert (batch["known"][:, :, 0] == batch["known"][:, :, 1]).all()
    rows = np.arange(40, 52)
    train = table["price"][:42]
    known = batch["known"][0, :, 0].numpy()
    assert known[:, 5] == pytest.approx((rows % 7 + 1 - train.mean()) / train.std(ddof=0), abs=1e-5)
    assert known[:, 6].tolist() == (rows % 5 == 0).astype(float).tolist()
    assert known[:, 0] == pytest.approx(rows % 24 / 23 - 0.5, abs=1e-6)
    short = load_series(tmp_path / "t.csv", 8, 4, split=(0.7, 0.1, 0.2), known=["sale"], known_steps=4)
    assert short.test.fetch(np.array([0]), None)["known"][0, :, 0, 0].tolist() == [0, 0, 1, 0]


def test_known_columns_may_go_on_behind_the_targets(tmp_path: Path) -> None:
    table = frame()
    table.loc[50:, ["a", "b"]] = np.nan
    read = read_table(csv(tmp_path, table), known=["price", "sale"])
    assert read.known is not None
    ahead = len(read.known) - len(read.values)
    assert (read.values.shape, read.known.shape, ahead) == ((50, 2), (60, 2), 10)
    data = load_series(tmp_path / "t.csv", 8, 4, split=SplitRule("last", last=(8, 10)), known=["price", "sale"])
    assert data.split.borders == (32, 40, 50)
    table.loc[3, "price"] = np.nan
    with pytest.raises(UserError, match=r"column 'price' has 1 missing value\(s\)"):
        read_table(csv(tmp_path, table), known=["price", "sale"], missing="mask")
    with pytest.raises(UserError, match=r"data\.known: 'prize' is not a column; did you mean 'price'\?"):
        read_table(tmp_path / "t.csv", known=["prize"])
    with pytest.raises(UserError, match=r"data\.known: 'a' is also in data\.columns"):
        read_table(tmp_path / "t.csv", columns=["a"], known=["a"])


def test_holes_by_mask(tmp_path: Path) -> None:
    table = frame()[["date", "a", "b"]]
    table.loc[[3, 4, 50], "a"] = np.nan
    data = load_series(csv(tmp_path, table), 8, 4, split=(0.7, 0.1, 0.2), missing="mask")
    assert data.table.holes == 3
    seen = np.arange(42.0)[~np.isin(np.arange(42), [3, 4])]
    assert data.scaler.mean[0] == pytest.approx(seen.mean())
    assert data.scaler.std[0] == pytest.approx(seen.std())
    batch = data.test.fetch(np.arange(len(data.test)), None)
    for index in range(len(data.test)):
        rows = np.arange(40 + index, 52 + index)
        mask = np.concatenate([batch["mask"][index].numpy(), batch["future_mask"][index].numpy()])
        both = np.concatenate([batch["past"][index].numpy(), batch["future"][index].numpy()])
        assert mask[:, 0].tolist() == (rows != 50).tolist()
        assert mask[:, 1].all()
        assert both[rows == 50, 0].tolist() == [0.0] * int((rows == 50).sum())
        assert data.scaler.inverse(both)[rows != 50, 0] == pytest.approx(rows[rows != 50], abs=1e-4)
    whole = load_series(csv(tmp_path, frame()[["date", "a"]]), 8, 4, split=(0.7, 0.1, 0.2), missing="mask")
    assert whole.train.fetch(np.array([0]), None)["mask"].all()


def test_splits_by_date_and_from_the_end(tmp_path: Path) -> None:
    file = csv(tmp_path, frame()[["date", "a"]])
    by_date = load_series(file, 8, 4, split=SplitRule("date", dates=("2020-01-02 06:30", "2020-01-03")))
    assert by_date.split.borders == (31, 48, 60)
    assert load_series(file, 8, 4, split=SplitRule("last", last=(6, 9))).split.borders == (45, 51, 60)
    for rule, message in (
        (SplitRule("date", dates=("2019-01-01", "2020-01-03")), "leaves none of the 60 rows for training"),
        (SplitRule("date", dates=("2020-01-03", "2020-01-02")), "must be the first date of validation"),
        (SplitRule("last", last=(30, 30)), r"t\.csv: data\.split=last .* leaves none"),
        (SplitRule("last", last=(30,)), "must be the numbers of validation and test time steps"),
        (SplitRule("ratio", parts=(0.5, 0.1, 0.1)), r"t\.csv: data\.ratios=.* add up to 1"),
    ):
        with pytest.raises(UserError, match=message):
            load_series(file, 8, 4, split=rule)
    frame()[["a"]].to_csv(tmp_path / "bare.csv", index=False)
    with pytest.raises(UserError, match=r"bare\.csv: data\.split=date needs a time column"):
        load_series(tmp_path / "bare.csv", 8, 4, split=SplitRule("date", dates=("2020-01-02", "2020-01-03")))
    with pytest.raises(UserError, match=r"bare\.csv: data\.calendar=true needs a time column"):
        load_series(tmp_path / "bare.csv", 8, 4, calendar=True)
    frame()[::-1].to_csv(tmp_path / "back.csv", index=False)
    by_date = load_series(tmp_path / "back.csv", 8, 4, split=SplitRule("date", dates=("2020-01-02", "2020-01-03")))
    assert by_date.split.borders == (24, 48, 60)


def test_dates_are_those_of_the_time_zone_of_the_table(tmp_path: Path) -> None:
    days = pd.date_range("2023-10-01", periods=60, freq="D", tz="Europe/Berlin")
    pd.DataFrame({"date": days, "a": np.arange(60.0)}).to_parquet(tmp_path / "t.parquet")
    rule = SplitRule("date", dates=("2023-10-31", "2023-11-15"))
    assert load_series(tmp_path / "t.parquet", 6, 3, split=rule).split.borders == (30, 45, 60)


def test_the_keys_of_the_configuration() -> None:
    dates = ["data.split=date", "data.dates=[2017-01-01,2017-02-01 06:00]"]
    made = load_config("tsm2_etth1", dates).data
    assert isinstance(made, SeriesDataConfig)
    assert made.dates == ["2017-01-01", "2017-02-01 06:00"]
    for overrides, message in (
        (["data.split=date"], r"data\.dates=None: give the first date"),
        (["data.split=last", "data.last=[3]"], r"data\.last=\[3\]: give the number of time steps"),
        (["data.split=half"], r"data\.split='half': choose one of etth, ettm, ratio, date, last"),
        (["data.stride=0"], r"data\.stride=0"),
        (["data.missing=drop"], r"data\.missing='drop': choose one of error, ffill, interpolate, zero, mask"),
        (["data=panel", "data.split=etth"], "choose one of prepared, ratio, date, last"),
        (["data=panel", "data.split=ratio", "data.missing=ffill"], "choose one of error, mask"),
        (["data.static=[a]"], r"unknown key 'data\.static'"),
    ):
        with pytest.raises(UserError, match=message):
            load_config("tsm2_etth1", overrides)
    m5 = load_config("tsm2_m5")
    assert (m5.data.kind, m5.model.name) == ("panel", "tsm2")


def test_a_model_that_does_not_fit_names_the_keys(tmp_path: Path) -> None:
    config = SeriesDataConfig(path=str(csv(tmp_path, frame())), known=["price"], calendar=True)
    model = TSM2Config(lookback=8, horizon=2, patch_size=4)
    data = open_data(config, model)
    with pytest.raises(
        UserError, match=r"model\.future_features is 0, but the data has 6 \(.*hour, .*price\): set .*=6"
    ):
        check_inputs(data, model, "t.csv")
    check_inputs(data, TSM2Config(lookback=8, horizon=2, patch_size=4, future_features=6), "t.csv")
    with pytest.raises(UserError, match=r"model\.static_features is 2, .* 0 \(no static columns\): set .*=0"):
        check_inputs(data, TSM2Config(future_features=6, static_features=2), "t.csv")


def test_tables_are_drawn(tmp_path: Path) -> None:
    table = frame(9000)
    table.loc[100:2000, "b"] = np.nan
    run = CliRunner()
    picture = tmp_path / "new" / "t.png"
    file = csv(tmp_path, table)
    done = run.invoke(app, ["describe", str(file), "--plot", str(picture), "--dates", "2020-09-01,2020-11-01"])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"must end in \.png"):
        run.invoke(app, ["describe", str(file), "--plot", "x.jpg"], catch_exceptions=False)
    options = ["--plot", str(picture), "--dates", "2010-09-01,2020-11-01"]
    with pytest.raises(UserError, match="leaves none of the 9000 rows"):
        run.invoke(app, ["describe", str(file), *options], catch_exceptions=False)
