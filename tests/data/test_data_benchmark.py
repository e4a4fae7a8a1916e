"""``benchmarks/data.py`` runs and reports each of its parts; what it measures is not asserted here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_part_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/data.py"), "--smoke", "--json", str(tmp_path / "out.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    expected = {"images", "memory", "series"} | ({"ffcv"} if importlib.util.find_spec("ffcv") else set())
    assert {figure["part"] for figure in figures} == expected
    assert all(figure["value"] > 0 for figure in figures if figure["unit"] != "MiB")
