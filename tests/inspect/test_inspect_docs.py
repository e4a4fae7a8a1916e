"""docs/models.md: its examples run, its tables and its pictures are those of the code."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmtrain.config
from mmtrain.config.models import MODELS, preset
from mmtrain.inspect.stages import stage_table, total
from tests.conftest import ROOT, Done

PAGE = (ROOT / "docs" / "models.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in, where configurations come out tiny and short."""
    whole = mmtrain.config.load_config

    def load(name: str, overrides: list[str]) -> Any:
        kind = ["model.dims=[4,8,8]", "data.image_size=16"] if "vim2" in name else ["model.dim=8"]
        return whole(name, [*overrides, *kind, "train.max_steps=2", "train.batch_size=4", "threads=1"])

    monkeypatch.setattr(mmtrain.config, "load_config", load)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # to pack in this process: starting others takes seconds
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(which: str, folder: Path) -> dict[str, Any]:
    (code,) = [code for code in EXAMPLES if which in code]
    assert len(code.splitlines()) < 20
    (folder / "example.py").write_text(code)
    return runpy.run_path(str(folder / "example.py"), run_name="__main__")


def test_own_images(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (small / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(small / "photos" / name / f"{i}.png")
    shutil.copy(small / "photos" / "cat" / "0.png", small / "new.jpg")
    example("prepare_images", small)
    said = capsys.readouterr().out
    assert "% of the test images" in said
    assert {"cat", "dog"} <= set(said.split())


def test_own_series(small: Path, waves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(waves, small / "sales.csv")
    example("sales.csv", small)
    said = capsys.readouterr().out
    assert "test MSE" in said
    assert len(re.findall(r"^[abc] \[", said, re.MULTILINE)) == 3


def test_one_position_at_a_time(tmp_path: Path) -> None:
    found = example("prefill", tmp_path)
    whole = found["mixer"](torch.cat([found["past"], found["new"][:, None]], 1))
    torch.testing.assert_close(found["y"], whole[:, :-1])
    torch.testing.assert_close(found["y_new"], whole[:, -1])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("vim2_large", "vim2_huge") else ()) for n in MODELS]
)
def test_the_sizes_are_those_of_the_code(name: str) -> None:
    (line,) = re.findall(rf"^\| `{name}`.*$", PAGE, re.MULTILINE)
    side = 32 if name == "vim2_nano" else 224
    whole = total(stage_table(preset(name), image_size=(side, side)))
    figures = f"| {whole.parameters / 1e6:.2f} | {whole.flops / 1e9:.4g} | {whole.scan_flops / whole.flops:.0%} |"
    assert figures in line, f"docs/models.md: the line of {name} should hold {figures}"


def test_the_printed_table_is_that_of_the_command(look: Any) -> None:
    done: Done = look("vim2_tiny")
    printed = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
    assert printed in PAGE


def test_the_parts_of_tiny_add_up() -> None:
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    parts = [tuple(int(cell.replace(",", "")) for cell in row) for row in rows]
    assert len(parts) == 15
    assert all(count * each == product for count, each, product in parts)
    assert sum(product for _, _, product in parts) == total(stage_table(preset("vim2_tiny"))).parameters


def test_pictures_and_the_script_that_makes_them(
    series_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], picture: Any
) -> None:
    linked = re.findall(r"!\[[^\]]+\]\(images/(models_\w+\.png)\)", PAGE)
    assert len(linked) == len(set(linked)) == 7
    for name in linked:
        picture(ROOT / "docs" / "images" / name)
    monkeypatch.setattr(sys, "argv", ["make_model_pictures.py", str(series_run), "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "make_model_pictures.py"), run_name="__main__")
    written = [Path(line) for line in capsys.readouterr().out.split()]
    of_this_run = [name for name in linked if not re.search("(averaging|selection)_vim2", name)]
    assert sorted(path.name for path in written) == sorted(of_this_run)
    for path in written:
        picture(path)
