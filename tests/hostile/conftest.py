"""Copies of runs of version 0.1.0, to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.compat import reading
from tests.hostile.made import RUN, newest


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of version 0.1.0 that was stopped in the middle, and its data."""
    folder = tmp_path_factory.mktemp("made")
    reading.unpack(folder, "data", RUN)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of ``made`` in the folder that ``cli`` runs in."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def checkpoint(here: Path) -> Path:
    """The newest checkpoint of the run in ``here``."""
    return newest(here)
