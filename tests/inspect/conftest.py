"""Two tiny trained runs, and ``mmtrain model`` as a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmtrain.config import load_config
from mmtrain.train.session import train
from tests.conftest import Cli, Done

Look = Callable[..., Done]


@pytest.fixture(scope="session")
def vision_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "vision"
    overrides = [f"data.root={digits}", "data.image_size=16", "model.dims=[8,16,16]", "train.max_steps=8"]
    train(load_config("vim2_digits", [*overrides, "train.ema_decay=null", "tracking.plots=false", "threads=1"]), folder)
    return folder


@pytest.fixture(scope="session")
def series_run(waves: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "series"
    overrides = [f"data.path={waves}", "data.columns=null", "model.lookback=48", "model.horizon=24", "model.dim=8"]
    train(load_config("tsm2_traffic", [*overrides, "train.max_steps=8", "tracking.plots=false", "threads=1"]), folder)
    return folder


@pytest.fixture
def look(cli: Cli) -> Look:
    """Run ``mmtrain model …`` in an empty folder."""
    return lambda *arguments: cli("model", *arguments)


@pytest.fixture
def picture() -> Callable[[Path], NDArray[np.uint8]]:
    """The pixels of a picture that is sensible in size and not blank."""

    def read(path: Path) -> NDArray[np.uint8]:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width, _ = pixels.shape
        assert 250 <= height <= 4000
        assert 400 <= width <= 4000
        assert len(np.unique(pixels.astype(np.int32) @ np.array([65536, 256, 1]))) > 50
        return pixels

    return read
