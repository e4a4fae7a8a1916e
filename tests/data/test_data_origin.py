"""Where a source lies does not matter, its content does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mmtrain.data.prepare import output as module
from mmtrain.data.prepare.images import prepare_images
from mmtrain.data.prepare.output import Origin, same_path
from mmtrain.data.prepare.panel import prepare_panel
from mmtrain.data.prepare.targets import prepare_segmentation
from mmtrain.errors import UserError
from tests.data.conftest import png
from tests.data.panels import LAST, long_frame, write


def photos(here: Path) -> Callable[[str], Any]:
    for name in ("cat", "dog"):
        (here / "source" / name).mkdir(parents=True)
        for number in range(4):
            (here / "source" / name / f"{number}.png").write_bytes(png(number))
    return lambda root: prepare_images(root, here / "out", val_fraction=0.25, test_fraction=0, workers=1)


def masks(here: Path) -> Callable[[str], Any]:
    for kind in ("images", "annotations"):
        for split in ("train", "val"):
            (here / "source" / kind / split).mkdir(parents=True)
            (here / "source" / kind / split / "0.png").write_bytes(png(mode="L" if kind == "annotations" else "RGB"))
    return lambda root: prepare_segmentation(root, here / "out", workers=1)


def sales(here: Path) -> Callable[[str], Any]:
    write(long_frame([20, 16]), here / "source" / "long.csv")
    dates = pd.date_range("2024-01-01", periods=40)
    write(pd.DataFrame({"date": dates, "holiday": 1.0}), here / "days.csv")
    return lambda root: prepare_panel(root, here / "out", split=LAST, calendar=here / "days.csv", columns=["y"])


@pytest.fixture(params=[photos, masks, sales], ids=["images", "masks", "panel"])
def prepare(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Any]:
    """Prepares ``tmp_path``/out from a folder; it was done once from ``tmp_path``/source."""
    made = request.param(tmp_path)
    assert made(str(tmp_path / "source")).fresh
    return made


def test_other_paths_to_the_same_source(prepare: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    monkeypatch.chdir(tmp_path / "sub")
    for root in ("../source", "../sub/../source/", f"{tmp_path}/sub/../source", "../link"):
        assert not prepare(root).fresh, root


def test_a_source_that_was_moved_or_copied_is_the_same(prepare: Callable, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "source", tmp_path / "copy", copy_function=shutil.copyfile)
    assert not prepare(str(tmp_path / "copy")).fresh
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    assert not prepare(str(tmp_path / "elsewhere")).fresh
    (tmp_path / "elsewhere" / ".DS_Store").write_bytes(b"of the file manager")
    assert not prepare(str(tmp_path / "elsewhere")).fresh


@pytest.mark.parametrize("what", ["more", "renamed", "changed"])
def test_another_content_at_another_place_is_refused(prepare: Callable, tmp_path: Path, what: str) -> None:
    shutil.copytree(tmp_path / "source", tmp_path / "copy")
    file = next(file for file in sorted((tmp_path / "copy").rglob("*")) if file.is_file())
    if what == "changed":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif what == "more":
        shutil.copy(file, file.with_name(f"9{file.suffix}"))
    else:
        file.rename(file.with_name(f"9{file.suffix}"))
    with pytest.raises(
        UserError, match=r"contains a dataset prepared with source '.*source', not '.*copy'; give --force"
    ):
        prepare(str(tmp_path / "copy"))


def test_one_that_does_not_say_its_content_is_told_by_its_path(prepare: Callable, tmp_path: Path) -> None:
    """As version 0.1.0 wrote them."""
    file = tmp_path / "out" / "meta.json"
    meta = json.loads(file.read_text())
    del meta["content"]
    file.write_text(json.dumps(meta))
    assert not prepare(f"{tmp_path}/out/../source").fresh
    shutil.copytree(tmp_path / "source", tmp_path / "copy")
    with pytest.raises(UserError, match="contains a dataset prepared with source"):
        prepare(str(tmp_path / "copy"))


def test_the_files_of_settings_count_as_content(tmp_path: Path) -> None:
    prepare = sales(tmp_path)
    assert prepare(str(tmp_path / "source")).fresh
    (tmp_path / "moved").mkdir()
    for name in ("source", "days.csv"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    options: dict[str, Any] = {"split": LAST, "columns": ["y"]}
    calendar = tmp_path / "moved" / "days.csv"
    assert not prepare_panel(tmp_path / "moved" / "source", tmp_path / "out", calendar=calendar, **options).fresh
    calendar.write_text(calendar.read_text().replace("1.0", "2.0"))
    with pytest.raises(UserError, match=r"prepared with source .*; calendar "):
        prepare_panel(tmp_path / "moved" / "source", tmp_path / "out", calendar=calendar, **options)


def test_of_much_data_a_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ", 10)
    monkeypatch.setattr(module, "_END", 4)
    for number in range(200):
        (tmp_path / f"{number:03d}").write_bytes(b"begin middle end")
    whole = Origin.of(tmp_path).content()
    (tmp_path / "001").write_bytes(b"begin MIDDLE end")
    assert Origin.of(tmp_path).content() == whole
    (tmp_path / "000").write_bytes(b"begin middle END")
    assert Origin.of(tmp_path).content() != whole


def test_paths_of_several_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert same_path("a, b; c/../d, e", os.path.realpath("a") + ", b; d, e")
    assert not same_path("a, b", "b, a")
    assert not same_path(None, "a")
    with pytest.raises(UserError, match="cannot be read"):
        Origin.of(tmp_path / "none").content()
