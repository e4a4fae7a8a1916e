"""The command line as a user meets it: what it prints, its exit status, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.main import get_command

from mmtrain.cli import data
from mmtrain.cli.app import app
from mmtrain.config import config_names, load_config
from mmtrain.train.session import train
from tests.conftest import ROOT, Cli, Done, cpu_seconds


@pytest.fixture(scope="module")
def vision_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "run"
    overrides = [f"data.root={digits}", "data.image_size=16", "model.dims=[8,16,16]", "train.max_steps=50"]
    train(load_config("vim2_digits", [*overrides, "threads=1"]), folder)
    return folder


@pytest.fixture(scope="module")
def series_run(waves: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series") / "run"
    overrides = [
        f"data.path={waves}",
        "data.columns=null",
        "model.lookback=48",
        "model.horizon=24",
        "model.dim=8",
        "optim.lr=3e-3",
    ]
    train(load_config("tsm2_traffic", [*overrides, "train.epochs=3", "threads=1"]), folder)
    return folder


def refused(done: Done, *words: str) -> None:
    """One message, exit status 2, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# ---------------------------------------------------------------- speed of the door


def quickest(*command: str) -> float:
    return min(cpu_seconds(*command) for _ in range(3))


def test_import_and_help_are_quick() -> None:
    assert quickest("-c", "import mmtrain") <= 3
    assert quickest("-m", "mmtrain", "--help") <= 1.5


def test_help_is_that_of_the_commands_and_imports_none_of_them() -> None:
    for group in (app, data.app, data.prepare):
        commands = get_command(group).commands  # type: ignore[attr-defined]
        for name in commands:
            assert commands[name].name == name
            assert commands[name].help
    code = "import sys, mmtrain.cli.submit, mmtrain.cli.train, mmtrain.cli.runs, mmtrain.cli.data.series\n"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, cwd=ROOT)
    code = """
import sys
from mmtrain.cli import main
sys.argv[1:] = ["--help"]
try:
    main()
finally:
    assert {m for m in sys.modules if m.startswith("mmtrain.cli.")} == {"mmtrain.cli.app", "mmtrain.cli.common"}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_configs_lists_local_ones_first_and_describes_them(cli: Cli, tmp_path: Path) -> None:
    assert cli("--version").stdout.startswith("mmtrain ")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "vim2_digits.yaml").write_text(
        f"# Mine.\ninclude: {ROOT}/configs/vim2_digits.yaml\nseed: 7\n"
    )
    lines = cli("configs").stdout.splitlines()
    assert lines[0] == "configs:"
    assert lines[1].split() == ["vim2_digits", "Mine."]
    assert lines[2] == f"{ROOT / 'configs'}:"
    assert not [line for line in lines[3:] if line.split()[0] in ("vim2_digits", "base/vision")]
    assert all(len(line.split()) > 2 for line in lines[3:])  # every one is described
    assert "seed: 7" in cli("train", "--config", "vim2_digits", "--print-config").stdout


@pytest.mark.slow
def test_as_a_program_it_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    for command in (["-m", "mmtrain", "train"], [str(ROOT / "launch/submit.py")]):
        done = subprocess.run(
            [sys.executable, *command, "--config", "nonsense"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: --config nonsense")


# ---------------------------------------------------------------- train and submit


def test_print_config_prints_and_does_nothing_else(cli: Cli, tmp_path: Path) -> None:
    done = cli("train", "--config", "vim2_digits", "--print-config", "optim.lr=0.5")
    assert done.returncode == 0
    assert "lr: 0.5" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_bad_configurations_are_refused(cli: Cli, tmp_path: Path) -> None:
    refused(cli("train", "--config", "nonsense"), *config_names())
    refused(cli("train", "--config", "vim2_digits", "train.epocs=3"), "train.epocs", "train.epochs")
    refused(cli("launch/submit.py", "--config", "vim2_digits", "--debug", "optim.lr=fast"), "optim.lr")
    assert list(tmp_path.iterdir()) == []


def test_missing_data_says_how_to_get_it_and_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    refused(cli("launch/submit.py", "--config", "vim2_base_in1k", "--debug"), "imagenet", "data=synthetic", "prepare")
    refused(cli("launch/submit.py", "--config", "tsm2_etth1", "--local", "1"), "ETTh1", "MMTRAIN_DATA")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_debug_runs_imagenets_configuration_on_made_up_images(cli: Cli, tmp_path: Path) -> None:
    done = cli("launch/submit.py", "--config", "vim2_base_in1k", "--debug", "data=synthetic", "data.image_size=64")
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr
    result = json.loads((tmp_path / "runs/debug/vim2_base_in1k/result.json").read_text())
    assert result["step"] == 2


def test_dry_run_prints_the_job_and_touches_nothing(cli: Cli, tmp_path: Path) -> None:
    job = ("launch/submit.py", "--config", "vim2_base_in1k", "model=vim2_nano")  # a small one is planned sooner
    done = cli(*job, "--nodes", "4", "--partition", "gpu", "--dry-run")
    assert done.returncode == 0, done.stderr
    for line in ("#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=8", "#SBATCH --partition=gpu", "--kill-on-bad-exit=1"):
        assert line in done.stdout
    assert "32 samples per rank" in done.stdout
    local = cli("launch/submit.py", "--config", "tsm2_etth1", "--local", "2", "--dry-run", "optim.lr=0.5")
    assert "2 processes" in local.stdout
    assert "lr: 0.5" in local.stdout
    assert list(tmp_path.iterdir()) == []


def test_flags_that_exclude_each_other_are_refused(cli: Cli) -> None:
    refused(cli("launch/submit.py", "--config", "tsm2_etth1", "--debug", "--local", "2"), "--local")
    refused(cli("launch/submit.py", "--config", "tsm2_etth1", "--nodes", "2", "--local", "2"), "--nodes")
    refused(cli("launch/submit.py", "--config", "tsm2_etth1", "--local", "0"), "--local 0")


# ---------------------------------------------------------------- using a model


def test_predict_names_the_digit(cli: Cli, vision_run: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    shown = load_digits()
    hits = 0
    files = []
    for i in range(20):
        pixels = (shown.images[i] / 16 * 255).astype(np.uint8)
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC).save(files[-1])
    done = cli("predict", vision_run, *files, "--out", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "made" / "classes.csv").read_text().splitlines()
    assert written[0] == "file,rank,class,probability"
    assert [line.split(",")[:2] for line in written[1:]] == [[str(f), str(rank)] for f in files for rank in range(1, 6)]
    blocks = done.stdout.partition("written: ")[0].split(str(tmp_path))[1:]
    for i, block in enumerate(blocks):
        rows = [line.split() for line in block.splitlines()[1:]]
        assert len(rows) == 5
        shares = [float(share.rstrip("%")) for share, _ in rows]
        assert shares == sorted(shares, reverse=True)
        hits += rows[0][1] == str(shown.target[i])
    assert hits >= 10  # chance is 2


def test_a_classifier_draws_what_it_takes_for_what(vision_run: Path) -> None:
    assert json.loads((vision_run / "result.json").read_text())["pictures"] == ["confusion.png"]
    with Image.open(vision_run / "confusion.png") as picture:
        assert min(picture.size) > 500


def test_predict_refuses_what_is_no_image(cli: Cli, vision_run: Path, waves: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"no image" * 20)
    refused(cli("predict", vision_run, broken), "broken.png")
    refused(cli("predict", vision_run, tmp_path / "gone.png"), "gone.png")
    refused(cli("predict", vision_run, waves), "waves.csv")
    refused(cli("predict", tmp_path, broken), "not a run folder")


def test_forecast_is_written_and_drawn(cli: Cli, series_run: Path, waves: Path, tmp_path: Path) -> None:
    done = cli("predict", series_run, waves, "--out", "made", "--back", "24")
    assert done.returncode == 0, done.stderr
    made = pd.read_csv(tmp_path / "made" / "waves_forecast.csv", parse_dates=["date"])
    whole = pd.read_csv(waves, parse_dates=["date"])
    assert list(made.columns) == ["date", "a", "b", "c"]
    assert list(made["date"]) == list(whole["date"][-24:])
    error = (made[["a", "b", "c"]] - whole[["a", "b", "c"]].iloc[-24:].reset_index(drop=True)).abs().mean()
    assert (error < 0.5).all()  # the waves' mean absolute value is 0.64
    picture = Image.open(tmp_path / "made" / "waves_forecast.png")
    assert picture.size[0] > 800
    ahead = cli("predict", series_run, waves)
    assert ahead.returncode == 0
    beyond = pd.read_csv(tmp_path / "waves_forecast.csv", parse_dates=["date"])
    assert beyond["date"][0] == whole["date"].iloc[-1] + pd.Timedelta(hours=1)


def test_forecast_refuses_bad_tables(cli: Cli, series_run: Path, waves: Path, tmp_path: Path) -> None:
    whole = pd.read_csv(waves)
    whole.assign(d=1.0).to_csv(tmp_path / "more.csv", index=False)
    refused(cli("predict", series_run, "more.csv"), "more.csv", "d", "trained on")
    whole.drop(columns="b").to_csv(tmp_path / "fewer.csv", index=False)
    refused(cli("predict", series_run, "fewer.csv"), "fewer.csv", "lacks b")
    whole.assign(b="wet").to_csv(tmp_path / "text.csv", index=False)
    refused(cli("predict", series_run, "text.csv"), "text.csv", "b", "wet")
    holes = whole.copy()
    holes.loc[5, "c"] = np.nan
    holes.to_csv(tmp_path / "holes.csv", index=False)
    refused(cli("predict", series_run, "holes.csv"), "holes.csv", "c")
    whole.head(10).to_csv(tmp_path / "short.csv", index=False)
    refused(cli("predict", series_run, "short.csv"), "short.csv", "48")
    assert not list(tmp_path.glob("*_forecast*"))


def test_eval_repeats_the_runs_own_figure(cli: Cli, series_run: Path) -> None:
    done = cli("eval", series_run)
    assert done.returncode == 0, done.stderr
    result = json.loads((series_run / "result.json").read_text())
    assert json.loads(done.stdout)["mse"] == pytest.approx(result["test"]["mse"], rel=1e-5)
    refused(cli("eval", series_run, "--checkpoint", "77777"), "step_00077777")
    refused(cli("eval", series_run, "model.dim=16"), "model.dim")


def test_an_export_predicts_the_same(cli: Cli, series_run: Path, waves: Path, tmp_path: Path) -> None:
    assert cli("export", series_run, "--out", "exported").returncode == 0
    there = {p.name for p in (tmp_path / "exported").iterdir()}
    assert there == {"model.safetensors", "config.yaml", "assets.json"}
    for model, out in ((series_run, "one"), ("exported", "two")):
        assert cli("predict", model, waves, "--out", out).returncode == 0
    assert (tmp_path / "one/waves_forecast.csv").read_bytes() == (tmp_path / "two/waves_forecast.csv").read_bytes()
    refused(cli("export", series_run, "--out", "exported"), "exists")


def test_runs_and_doctor_tell(cli: Cli, series_run: Path) -> None:
    shown = cli("runs", series_run.parent)
    assert "tsm2" in shown.stdout
    assert "finished" in shown.stdout
    refused(cli("runs", "nowhere"), "nowhere")
    told = cli("doctor")
    assert told.returncode == 0
    assert "scan backend" in told.stdout
    assert "torch" in told.stdout
