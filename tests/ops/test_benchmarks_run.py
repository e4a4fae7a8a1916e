"""The benchmark scripts of the kernels run, print their tables and write what they printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_scan_cpu(tmp_path: Path) -> None:
    printed = run("scan_cpu.py", "--smoke", "--reference", "--json", str(tmp_path / "scan.json"))
    figures = json.loads((tmp_path / "scan.json").read_text())
    assert f"exponentials alone: {figures['exp_per_s'] / 1e9:.1f} G/s" in printed
    assert [row["pass"] for row in figures["rows"]] == ["forward", "fwd+bwd"] * 2
    for row in figures["rows"]:
        assert row["ratio"] == pytest.approx(row["plain_s"] / row["kernel_s"])
        assert f"{row['kernel_s'] * 1e3:.2f}" in printed
        assert row["memory_over_inputs"] >= 0


@pytest.mark.slow
def test_linear_cpu(tmp_path: Path) -> None:
    printed = run("linear_cpu.py", "--smoke", "--json", str(tmp_path / "linear.json"))
    rows = json.loads((tmp_path / "linear.json").read_text())["rows"]
    assert [row["product"] for row in rows] == ["forward", "dx", "dw"]
    for row in rows:
        assert f"{row['onednn_gflops'] / row['torch_gflops']:.2f}" in printed


@pytest.mark.slow
def test_model_steps(tmp_path: Path) -> None:
    printed = run("model_steps.py", "--smoke", "--json", str(tmp_path / "steps.json"))
    figures = json.loads((tmp_path / "steps.json").read_text())["seconds_a_sample"]
    assert list(figures["vision"]) == ["vim2_nano", "vim2_nano unfused", "vim2_nano plain"]
    assert list(figures["series"]) == ["tsm2", "tsm2 unfused", "tsm2 plain"]
    for name, seconds in (figures["vision"] | figures["series"]).items():
        assert any(line.startswith(f"{name} ") and f"{1 / seconds:.1f}" in line for line in printed.splitlines()), name


@pytest.mark.slow
def test_without_its_kernels_a_model_gives_the_same(tmp_path: Path) -> None:
    """What the benchmark compares with computes the same thing: its unfused composition is that of the models."""
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import torch
from model_steps import as_it_is, plain, unfused
from mmtrain.models import create_model
tsm2 = {{"lookback": 96, "dropout": 0.0}}
torch.manual_seed(6)  # the first average scales the input of a norm: its gradient is rounding, of a size that varies
for name, shape, options in (("vim2_nano", (2, 3, 40, 56), {{}}), ("tsm2", (2, 96, 3), tsm2)):
    model = create_model(name, **options)
    x, found = torch.randn(shape), []
    for mode in (as_it_is, unfused, plain):
        model.zero_grad()
        with mode():
            y = model(x)
            y.square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in found[1:]:
        assert len(other) == len(found[0])
        for a, b in zip(found[0], other):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6, name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
