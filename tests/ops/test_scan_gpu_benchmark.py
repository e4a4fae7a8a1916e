"""``benchmarks/scan_gpu.py`` runs, under Triton's interpreter; its figures then mean nothing and are not asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here (it is for Linux only)")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scan_gpu.py"


@pytest.mark.slow
def test_it_checks_and_times_everything(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert {row["run"] for row in figures["errors"]} >= {"ours", "copies + our 1-D scan"}
    assert all(row["ok"] for row in figures["errors"])
    assert {row["pass"] for row in figures["times"]} == {"forward", "fwd+bwd"}
    assert all(row["seconds"] > 0 for row in figures["times"])
    assert figures["models"][0]["images_per_s"] > 0
    assert "exp2" in done.stdout


@pytest.mark.slow
def test_it_tunes_and_leaves_the_table_alone() -> None:
    table = SCRIPT.parents[1] / "mmtrain" / "ops" / "triton" / "launch_table.json"
    before = table.read_text()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--tune"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("scan_forward", "scan_forward_few", "scan_backward", "conv_forward", "conv_backward"):
        assert f"default {kernel} " in done.stdout
    assert "chunk 8 " in done.stdout
    assert table.read_text() == before


def test_the_table_is_written_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmtrain.ops.triton import tuning

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    tune = importlib.import_module("scan_gpu_parts.tune")
    path = tmp_path / "table.json"
    tune.write_table(tuning.table(), path)
    assert path.read_text() == tuning.TABLE.read_text()
