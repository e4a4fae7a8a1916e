"""``mmtrain model`` as a user meets it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mmtrain.config import MODELS
from mmtrain.inference.trained import export, load_trained
from tests.conftest import Done

Look = Callable[..., Done]
Picture = Callable[[Path], NDArray[np.uint8]]


def refused(done: Done, *words: str) -> None:
    assert done.returncode == 2, done.stdout
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_by_name_with_overrides(look: Look) -> None:
    whole = look("vim2_nano", "--input-size", "32")
    assert whole.returncode == 0, whole.stderr
    assert "0.75 M parameters" in whole.stdout
    assert "1×16×16×32" in whole.stdout
    changed = look("vim2_nano", "num_classes=10", "dims=[8,16,16]", "--input-size", "32x24", "--batch", "3")
    assert "3×16×12×8" in changed.stdout
    assert "3×10" in changed.stdout
    series = look("tsm2", "model.lookback=64", "--variates", "4")
    assert "1×96×4" in series.stdout


def test_a_configuration_brings_its_own_input(look: Look, tmp_path: Path) -> None:
    assert "1×16×16×32" in look("vim2_digits").stdout
    assert "1×48×3" in look("tsm2_traffic").stdout
    (tmp_path / "mine.yaml").write_text(
        "model: {name: tsm2, horizon: 12}\ndata: {kind: series}\ntask: {kind: forecasting}"
    )
    assert "1×12×7" in look("mine.yaml", "dim=8").stdout


def test_what_is_unknown_is_refused_with_the_nearest(look: Look, tmp_path: Path) -> None:
    refused(look("vim2_smal"), "vim2_small", *MODELS)
    refused(look("tsm2_etth"), "did you mean 'tsm2_etth1'")
    refused(look("vim2_nano", "num_clases=10"), "num_classes")
    refused(look("vim2_nano", "num_classes"), "num_classes=10")
    refused(look("vim2_nano", "state=many"), "model.state='many'", "an int in [1, 64]")
    refused(look("vim2_nano", "state=100"), "model.state=100", "in [1, 64]")
    refused(look("vim2_nano", "--input-size", "big"), "--input-size big", "224x160")
    refused(look("vim2_nano", "--variates", "3"), "--input-size")
    refused(look("tsm2", "--input-size", "32"), "--variates")
    refused(look("tsm2", "--out", "pictures"), "--out", "run folder or an export")
    refused(look(tmp_path), "no config.yaml")


@pytest.mark.parametrize("kind", ["vision_run", "series_run"])
@pytest.mark.slow
def test_a_run_is_drawn_into_its_folder(
    kind: str, look: Look, picture: Picture, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(kind), run)
    done = look(run)
    assert done.returncode == 0, done.stderr
    drawn = [picture(run / name) for name in ("averaging.png", "selection.png")]
    assert all(str(run / name) in done.stdout for name in ("averaging.png", "selection.png"))
    assert drawn[0].shape != drawn[1].shape


def test_an_export_without_its_data_asks_for_a_file(
    series_run: Path, waves: Path, look: Look, picture: Picture, tmp_path: Path
) -> None:
    folder = export(load_trained(series_run), tmp_path / "exported")
    done = look(folder, "data.path=gone.csv", "--out", "pictures")
    assert done.returncode == 0
    assert "gone.csv" in done.stderr
    assert "--series FILE" in done.stderr
    picture(tmp_path / "pictures" / "averaging.png")
    assert not (tmp_path / "pictures" / "selection.png").exists()
    assert look(folder, "--out", "pictures", "--series", waves).returncode == 0
    picture(tmp_path / "pictures" / "selection.png")


def test_flags_that_do_not_fit_a_run_are_refused(series_run: Path, waves: Path, look: Look, tmp_path: Path) -> None:
    refused(look(series_run, "--out", "here", "--series", "gone.csv"), "gone.csv")
    refused(look(series_run, "--out", "here", "--image", waves), "forecasting", "--series")
    refused(look(series_run, "model.dim=3"), "only takes overrides of data")
    (tmp_path / "file").touch()
    refused(look(series_run, "--out", "file"), "--out")
