"""``benchmarks/trainer.py`` runs and reports each of its parts; what it measures is not asserted here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_part_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/trainer.py"), "--smoke", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert {figure["part"] for figure in found["figures"]} == {"overhead", "async", "fsdp", "restart"}
    assert all(figure["value"] > 0 for figure in found["figures"] if figure["unit"] != "%")
