"""Pictures of names that matplotlib takes for formulas; and that no picture ends what it is a picture of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtrain import plotting
from mmtrain.cli.trained import predict_command
from mmtrain.cluster.task import run_training
from mmtrain.config import load_config
from mmtrain.plotting import runs, selection, series, try_to_draw
from mmtrain.plotting.selection import AveragingMatrix, draw_averaging
from mmtrain.report.charts import Chart, Series, draw_chart
from mmtrain.tasks.forecasting import Forecasting

FORMULA = r"$\frac{$"
NAMES = [FORMULA, "$x$", "a$b", r"\$", "$$", "^_{}", "温度", "🙂", "a\nb", "\x00", "", " ", "<b>&", "x" * 40]


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are_written(tmp_path: Path) -> None:
    count = len(NAMES)
    past, made = np.ones((8, count)), np.zeros((4, count))
    line = {"kind": "train", "step": 1, "loss": 1.0, "lr": 0.1}
    measured = {"kind": "eval", "split": "val", "step": 1, "loss": 1.0, **dict.fromkeys(NAMES, 2.0)}
    step = selection.StepMap("m.mixers.0", "T1", "time", np.ones((count, 3), np.float32))
    starts, seen = np.array([0, 3, 6]), np.ones((8, count), np.float32)
    window = selection.WindowSelection([step], NAMES, seen, np.arange(8), starts)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    runs.draw_forecast(paths[0], NAMES, past, made, most=count)
    runs.draw_confusion(paths[1], NAMES, np.eye(count, dtype=int), FORMULA)
    runs.draw_curves(paths[2], [line, measured], NAMES)
    series.draw_series(paths[3], FORMULA, [series.Line(name, np.ones(9), None, (3, 6, 9)) for name in NAMES[:3]])
    draw_averaging(paths[4], [AveragingMatrix(FORMULA, [FORMULA, "out"], ["$x$", "T1"], np.ones((2, 2), np.float32))])
    selection.draw_window_selection(paths[5], window)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_test_result_is_no_point_of_the_validation_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(runs, "save", lambda figure, path: drawn.append(figure))
    lines = [{"kind": "eval", "split": "val", "step": n, "loss": 3.0 - n, "mse": 1.0 / n} for n in (1, 2)]
    test = {"kind": "eval", "split": "test", "step": 1, "loss": 9.0, "mse": 8.0}
    runs.draw_curves(tmp_path / "a.png", lines, ["mse"])
    runs.draw_curves(tmp_path / "b.png", [*lines, test], ["mse"])
    curves = [
        {line.get_label(): line.get_xydata().tolist() for axis in figure.axes for line in axis.lines}
        for figure in drawn
    ]
    assert curves[0]["val mse"] == curves[1]["val mse"] == [[1.0, 1.0], [2.0, 0.5]]
    assert curves[0]["val"] == curves[1]["val"] == [[1.0, 2.0], [2.0, 1.0]]
    assert curves[1]["test mse 8"] == [[1.0, 8.0]]


def test_a_name_in_a_report_is_no_formula() -> None:
    shown = draw_chart(Chart(FORMULA, [Series([(1, 1.0), (2, 1000.0)], "red")], log=True))
    assert FORMULA in shown


def test_a_failure_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(plotting.logger, "warning", lambda text, *values: told.append(text % values))

    def fail() -> None:
        raise ValueError("no such font")

    assert [try_to_draw(tmp_path / "a.png", fail) for _ in range(3)] == [False] * 3
    assert told == [f"{tmp_path / 'a.png'}: plot skipped, because drawing it failed (ValueError: no such font)"]
    assert try_to_draw(tmp_path / "a.png", lambda: None)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    wave = np.sin(np.arange(120) / 5)
    path.write_text(f"{FORMULA},b\n" + "".join(f"{x:.4f},{x:.3f}\n" for x in wave))
    return path


def _train(table: Path, run: Path, *overrides: str) -> Path:
    small = [f"data.path={table}", "data.split=ratio", "model.lookback=16", "model.horizon=4", "model.dim=8"]
    small += ["model.depth=1", "train.max_steps=2", "train.batch_size=8", "data.workers=0", "device=cpu"]
    run_training(load_config("tsm2_etth1", [*small, *overrides]), run)
    return run


def test_a_formula_among_the_columns_trains_and_predicts(table: Path, tmp_path: Path) -> None:
    run = _train(table, tmp_path / "run")
    assert json.loads((run / "result.json").read_text())["pictures"] == ["forecast.png"]
    assert (run / "curves.png").is_file()
    predict_command(str(run), [table], out=tmp_path / "out")
    assert (tmp_path / "out" / "table_forecast.png").is_file()


def test_a_picture_that_fails_ends_neither_a_run_nor_a_forecast(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no picture")

    for place in (
        "tasks.forecasting.draw_forecast",
        "inference.predict.draw_forecast",
        "train.trackers.tracker.draw_curves",
    ):
        monkeypatch.setattr(f"mmtrain.{place}", fail)
    run = _train(table, tmp_path / "run")
    assert json.loads((run / "result.json").read_text())["pictures"] == []
    capsys.readouterr()
    predict_command(str(run), [table], out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table_forecast.csv"]
    assert "table_forecast.png" not in capsys.readouterr().out


def test_without_plots_nothing_is_drawn(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forecasting, "illustrate", lambda *_: 1 / 0)
    run = _train(table, tmp_path / "run", "tracking.plots=false")
    assert not list(run.glob("*.png"))


def test_a_backend_that_is_none_is_left_out(tmp_path: Path) -> None:
    code = (
        "from mmtrain.plotting import *; f = new_figure(1, 1); save(f, Path('a.png')); print(os.environ['MPLBACKEND'])"
    )
    environment = {**os.environ, "MPLBACKEND": "xyz"}
    done = subprocess.run(
        [sys.executable, "-c", f"import os\n{code}"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("xyz\n", "")
    assert (tmp_path / "a.png").is_file()
