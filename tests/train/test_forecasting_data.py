"""Forecasting with panels, masks and inputs known in advance: trained, evaluated, planned and used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mmtrain.config import load_config
from mmtrain.data.prepare.panel import prepare_panel
from mmtrain.data.series.panel_inputs import pack
from mmtrain.data.series.split import SplitRule
from mmtrain.errors import UserError
from mmtrain.inference import forecast, forecast_panel, load_trained
from mmtrain.models.tsm2 import Forecasts
from mmtrain.tasks import StepKey, build_task
from mmtrain.tasks.forecasting import Forecasting
from mmtrain.train.session import train
from tests.conftest import Cli
from tests.data.panels import long_frame, write

MODEL = ["model.lookback=24", "model.horizon=4", "model.patch_size=8", "model.dim=8", "model.depth=1", "threads=1"]
TINY = [*MODEL, "train.max_steps=4", "train.batch_size=16", "eval.batch_size=7"]


class Wrong(nn.Module):
    """Forecasts what the batch says, off by so much."""

    def __init__(self, off: float, horizon: int = 4) -> None:
        super().__init__()
        self.off, self.horizon = off, horizon

    def forward(self, past: torch.Tensor, full: bool = False, **inputs: torch.Tensor) -> Forecasts:
        return Forecasts(torch.full((len(past), self.horizon, past.shape[2]), self.off))


def bare_task(loss: str = "mse") -> Forecasting:
    """The task without data."""
    task = object.__new__(Forecasting)
    task.options = SimpleNamespace(loss=loss, spread_weight=1.0)  # type: ignore[assignment]
    task.config = SimpleNamespace(data=SimpleNamespace(path="t.csv"), model=None)  # type: ignore[assignment]
    return task


def batch(samples: int, holes: float, seed: int = 0) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(seed)
    future = random.normal(size=(samples, 4, 3)).astype(np.float32)
    seen = random.random(future.shape) >= holes
    return {
        "past": torch.zeros(samples, 8, 3),
        "mask": torch.ones(samples, 8, 3, dtype=torch.bool),
        "future": torch.from_numpy(np.where(seen, future, 0).astype(np.float32)),
        "future_mask": torch.from_numpy(seen),
    }


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_holes_count_nowhere(loss: str) -> None:
    task, model = bare_task(loss), Wrong(0.5)
    made = batch(12, 0.4)
    made["future_mask"][3] = False  # a window without one target
    future, seen = made["future"].numpy().astype(np.float64), made["future_mask"].numpy()
    error = np.abs(future - 0.5) ** (2 if loss == "mse" else 1)
    per_window = [error[i][seen[i]].mean() if seen[i].any() else 0.0 for i in range(12)]
    assert task.loss(model, made, StepKey(0, 0)).item() == pytest.approx(np.mean(per_window), rel=1e-5)
    parts = [{key: value[begin : begin + 5] for key, value in made.items()} for begin in (0, 5, 10)]
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in task.measure(model, part).items():
            sums[name] = sums.get(name, 0.0) + value.item()
    found = task.metrics(sums)
    assert found["mse"] == pytest.approx(((future - 0.5) ** 2)[seen].mean(), rel=1e-6)
    assert found["mae"] == pytest.approx(np.abs(future - 0.5)[seen].mean(), rel=1e-6)
    assert found["samples"] == 12
    assert found["observed"] == pytest.approx(seen.mean())
    made["future"][~made["future_mask"]] = 1e9  # whatever lies in a hole
    assert task.loss(model, made, StepKey(0, 0)).item() == pytest.approx(np.mean(per_window), rel=1e-5)


def test_the_loss_does_not_depend_on_the_micro_batch() -> None:
    task, model = bare_task(), Wrong(0.3)
    made = batch(12, 0.6)
    whole = task.loss(model, made, StepKey(0, 0))
    halves = [{key: value[rank::2] for key, value in made.items()} for rank in range(2)]
    assert torch.stack([task.loss(model, half, StepKey(0, 0)) for half in halves]).mean().item() == pytest.approx(
        whole.item(), rel=1e-6
    )


def test_a_mask_without_holes_changes_nothing() -> None:
    task, model = bare_task(), Wrong(0.3)
    made = batch(12, 0.0)
    plain = {key: value for key, value in made.items() if "mask" not in key}
    assert task.loss(model, made, StepKey(0, 0)).item() == pytest.approx(
        task.loss(model, plain, StepKey(0, 0)).item(), rel=1e-6
    )
    masked, bare = (task.metrics({k: v.item() for k, v in task.measure(model, b).items()}) for b in (made, plain))
    assert masked["mse"] == pytest.approx(bare["mse"], rel=1e-12)
    assert "observed" not in bare
    made["future_mask"][:] = False
    with pytest.raises(UserError, match=r"t\.csv: a split has only missing target values"):
        task.metrics({k: v.item() for k, v in task.measure(model, made).items()})


@pytest.fixture(scope="module")
def panel_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a panel of four series with holes, prices, a calendar and static columns."""
    folder = tmp_path_factory.mktemp("panel_run")
    frame = long_frame([90, 40, 35, 70], ahead=4)
    random = np.random.default_rng(0)
    frame["y"] += random.normal(size=len(frame))
    frame.loc[random.choice(200, 12, replace=False), "y"] = np.nan
    file = write(frame, folder / "long.csv")
    options: dict[str, Any] = {"known": ["price"], "static": ["kind", "size"]}
    prepare_panel(file, folder / "shops", split=SplitRule("last", last=(4, 4)), **options)
    keys = ["data=panel", f"data.root={folder}", "data.path=shops", "data.missing=mask", "data.known=[price]"]
    keys += ["data.static=[kind,size]", "data.calendar=true", "data.split=prepared", "model.mask_input=true"]
    keys += ["model.static_features=3", "model.future_features=5"]
    train(load_config("tsm2_etth1", [*TINY, *keys]), folder / "run")
    return folder / "run"


def test_a_run_on_a_panel(panel_run: Path) -> None:
    trained = load_trained(panel_run, "last")
    assert trained.assets["columns"] == ["y"]
    assert trained.assets["ids"] == ["s0", "s1", "s2", "s3"]
    assert (panel_run / "forecast.png").is_file()
    task = build_task(trained.config)
    assert task.variates == 1
    first = next(iter(task.train.fetch(np.array([0]), None).values()))
    assert len(first) == 1


def test_the_panel_is_forecast_as_in_evaluation(panel_run: Path) -> None:
    """From 4 steps before the end: the windows of the test split, through another way."""
    trained = load_trained(panel_run, "last")
    made = forecast_panel(trained, panel_run.parent / "shops", back=4)
    task: Any = build_task(trained.config)
    seen = task.test.fetch(np.arange(len(task.test)), None)
    inputs = {key: seen[key] for key in ("mask", "static", "known")}
    with torch.no_grad():
        expected = trained.model(seen["past"], **inputs).numpy()
    series = task.test.locate(np.arange(len(task.test)))[0]
    scalers = task.series.inputs.scalers
    expected = expected * scalers.std[series][:, None] + scalers.mean[series][:, None]
    assert made.ids == task.series.panel.ids[series].tolist()
    assert made.values == pytest.approx(expected, rel=1e-4)
    mask = seen["future_mask"].numpy()
    assert np.isfinite(made.truth).tolist() == mask.tolist()


def test_the_commands_take_the_panel(panel_run: Path, cli: Cli, tmp_path: Path) -> None:
    folder = panel_run.parent / "shops"
    done = cli("predict", panel_run, folder, "--checkpoint", "last", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "4 time steps of 4 series" in done.stdout
    table = pd.read_csv(tmp_path / "out" / "shops_forecast.csv")
    assert list(table.columns) == ["id", "date", "y"]
    assert len(table) == 16
    assert table["date"][0] == "2024-03-31"  # the day after 90 days from new year
    assert np.isfinite(table["y"]).all()
    assert (tmp_path / "out" / "shops_forecast.png").is_file()
    back = cli("predict", panel_run, folder, "--checkpoint", "last", "--back", 12, "--out", tmp_path / "out")
    assert "4 time steps of 3 series (1 left out: shorter than the lookback)" in back.stdout
    assert "mean absolute error" in back.stdout
    assert cli("eval", panel_run, "--checkpoint", "last").returncode == 0
    plan = cli("plan", "--config", panel_run / "config.yaml")
    assert plan.returncode == 0, plan.stderr
    assert "windows of" in plan.stdout
    shown = cli("model", panel_run, "--checkpoint", "last", "--out", tmp_path / "seen")
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "seen" / "selection.png").is_file()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mean": None}, "TypeError"),
        ({"std": {"shape": [4, 1], "float64": "AAAA"}}, "ValueError"),
        ({"std": pack(np.array([[1.0], [0], [1], [1]]))}, "deviation at index 1, 0 is 0.0"),
        ({"std": pack(np.array([[1.0], [1], [np.nan], [1]]))}, "deviation at index 2, 0 is nan"),
        ({"ids": ["s0"]}, "1 series"),
        ({"static": [{"name": "size", "categories": [], "mean": 0, "std": 0}]}, "static column 'size'"),
        (
            {"known": {"calendar": [], "columns": ["price"], "scaler": {"mean": [0], "std": [0]}}},
            "deviation at index 0 is 0.0",
        ),
        ({"known": {"calendar": [], "columns": ["price"], "scaler": {"mean": [], "std": []}}}, "ValueError"),
    ],
)
def test_damaged_assets_of_a_panel_are_named(panel_run: Path, change: dict[str, Any], told: str) -> None:
    trained = load_trained(panel_run, "last")
    trained.assets.update(change)
    with pytest.raises(UserError, match=rf"run/assets\.json: .*{told}.*; restore the file"):
        forecast_panel(trained, panel_run.parent / "shops", back=4)


def test_a_panel_that_does_not_fit_the_model(panel_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = load_trained(panel_run, "last")
    options: dict[str, Any] = {"known": ["price"], "static": ["kind", "size"], "split": SplitRule("last", last=(1, 1))}
    new = long_frame([30, 40, 50, 30, 45], ahead=4)
    new["id"] = new["id"].replace({"s4": "new"})
    prepare_panel(write(new, tmp_path / "a.csv"), tmp_path / "a", **options)
    made = forecast_panel(trained, tmp_path / "a")
    assert "1 of 5 series are not in the training data: they are standardised by their own" in caplog.text
    assert abs(made.values[made.ids.index("new")] - 4022).max() < 200  # 4000 to 4044 in its own units
    prepare_panel(write(long_frame([30, 40]), tmp_path / "b.csv"), tmp_path / "b", **options)
    with pytest.raises(UserError, match=r"price end before the horizon of 2 series"):
        forecast_panel(trained, tmp_path / "b")
    bare = {**options, "known": [], "columns": ["y"]}
    prepare_panel(tmp_path / "b.csv", tmp_path / "c", **bare)
    with pytest.raises(UserError, match=r"there is no known column 'price'"):
        forecast_panel(trained, tmp_path / "c")
    with pytest.raises(UserError, match=r"no series has the 24 rows of a lookback before the last 30 rows"):
        forecast_panel(trained, tmp_path / "a", back=30)
    with pytest.raises(UserError, match=r"was trained on a panel. Give a folder"):
        forecast(trained, tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"not a prepared panel; run mmtrain data prepare panel"):
        forecast_panel(trained, tmp_path / "a.csv")


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table with holes, a known column and the calendar."""
    folder = tmp_path_factory.mktemp("table_run")
    rows = np.arange(200)
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=200, freq="h"), "a": np.sin(rows / 4)})
    frame["b"] = np.cos(rows / 5)
    frame["price"] = rows % 7 * 1.0
    frame.loc[[20, 21, 150], "a"] = np.nan
    frame.to_csv(folder / "t.csv", index=False)
    keys = [f"data.path={folder / 't.csv'}", "data.split=last", "data.last=[40,40]", "data.missing=mask"]
    keys += ["data.known=[price]", "data.calendar=true", "model.future_features=6", "model.mask_input=true"]
    train(load_config("tsm2_etth1", [*TINY, *keys]), folder / "run")
    return folder / "run"


def test_a_table_is_forecast_as_in_evaluation(table_run: Path, tmp_path: Path) -> None:
    trained = load_trained(table_run, "last")
    file = table_run.parent / "t.csv"
    made = forecast(trained, file, back=4, missing="mask")
    task: Any = build_task(trained.config)
    last = task.test.fetch(np.array([len(task.test) - 1]), None)
    with torch.no_grad():
        expected = trained.model(last["past"], mask=last["mask"], known=last["known"])[0].numpy()
    assert made.values == pytest.approx(task.series.scaler.inverse(expected), rel=1e-4, abs=1e-5)
    with pytest.raises(UserError, match=r"the model needs price for 4 time step\(s\) after the last row"):
        forecast(trained, file, missing="mask")
    with pytest.raises(
        UserError, match=r"'a' has 3 missing value\(s\).*or set --missing ffill \(or interpolate, zero, mask\)"
    ):
        forecast(trained, file, back=4)
    table = pd.read_csv(file)
    ahead = pd.date_range(table["date"].iloc[-1], periods=5, freq="h")[1:]
    more = pd.concat([table, pd.DataFrame({"date": ahead.astype(str), "price": [200 % 7, 201 % 7, 202 % 7, 203 % 7]})])
    more.to_csv(tmp_path / "more.csv", index=False)
    found = forecast(trained, tmp_path / "more.csv", missing="mask")
    assert found.stamps is not None
    assert found.stamps[-4:].astype("datetime64[h]").tolist() == ahead.to_numpy().astype("datetime64[h]").tolist()
    assert found.truth is None
    # the price matters: another one gives another forecast
    more.loc[more.index[-4:], "price"] = 100.0
    more.to_csv(tmp_path / "more.csv", index=False)
    assert not np.allclose(forecast(trained, tmp_path / "more.csv", missing="mask").values, found.values)


def test_another_step_is_told_once(table_run: Path, panel_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = load_trained(table_run, "last")
    table = pd.read_csv(table_run.parent / "t.csv")
    caplog.clear()
    forecast(trained, table_run.parent / "t.csv", back=4, missing="mask")
    assert not caplog.messages
    other = table_run.parent / "days.csv"
    table.assign(date=pd.date_range("2024-01-01", periods=200, freq="D")).to_csv(other, index=False)
    forecast(trained, other, back=4, missing="mask")
    assert caplog.messages == [
        f"{other}: its time step is 1D, but the model was trained on time steps of 1h. The forecast has 4 time steps"
        " of 1D"
    ]
    assert load_trained(panel_run, "last").assets["step"] == "1D"


def test_the_stamps_of_the_table_are_used_where_there_are_some(table_run: Path, tmp_path: Path) -> None:
    trained = load_trained(table_run, "last")
    table = pd.read_csv(table_run.parent / "t.csv")
    days = pd.date_range("2024-01-01", periods=202, freq="B").delete([195, 201])  # a holiday among the last
    table.assign(date=days).to_csv(tmp_path / "t.csv", index=False)
    for back, expected in ((4, days[-4:]), (6, days[-6:-2])):
        made = forecast(trained, tmp_path / "t.csv", back=back, missing="mask")
        assert made.stamps is not None
        assert made.stamps[-4:].tolist() == expected.to_numpy().astype(made.stamps.dtype).tolist()
    odd = pd.to_datetime(["2024-10-10", "2024-10-13", "2024-10-20", "2024-11-01"])
    ahead = pd.DataFrame({"date": odd, "price": 1.0})
    pd.concat([table.assign(date=days), ahead]).to_csv(tmp_path / "more.csv", index=False)
    made = forecast(trained, tmp_path / "more.csv", missing="mask")
    assert made.stamps is not None
    assert made.stamps[-4:].tolist() == odd.to_numpy().astype(made.stamps.dtype).tolist()


def test_calendar_features_go_on_behind_the_table(tmp_path: Path) -> None:
    rows = pd.date_range("2024-01-01", periods=120, freq="h")
    file = tmp_path / "t.csv"
    pd.DataFrame({"date": rows, "a": np.sin(np.arange(120) / 4)}).to_csv(file, index=False)
    keys = [f"data.path={file}", "data.split=last", "data.last=[20,20]", "data.calendar=true"]
    train(load_config("tsm2_etth1", [*TINY, *keys, "model.future_features=5", "model.future_length=4"]), tmp_path / "r")
    trained = load_trained(tmp_path / "r", "last")
    seen: list[torch.Tensor] = []
    trained.model.register_forward_pre_hook(lambda m, args, given: seen.append(given["known"]), with_kwargs=True)
    forecast(trained, file)
    assert seen[0].shape == (1, 4, 1, 5)
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx([hour / 23 - 0.5 for hour in range(4)])
