"""Folders of images as they are found: every split is recognised, and what is not taken is counted and named."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mmtrain.data.prepare.folders import Ignored, image_files
from mmtrain.data.prepare.imagenet import prepare_imagenet
from mmtrain.data.prepare.images import prepare_images
from mmtrain.data.prepare.output import Prepared
from mmtrain.errors import UserError


def fill(folder: Path, *names: str) -> None:
    """A small image under each name, whatever its ending; "A*3.jpg" is three of them."""
    for name in names:
        stem, suffix = os.path.splitext(name)
        stem, _, many = stem.partition("*")
        for number in range(int(many or 1)):
            path = folder / f"{stem}{number if many else ''}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * number % 256, 9, 9)).save(path, "PNG" if suffix == ".png" else "JPEG")


def prepare(root: Path, out: Path, **options: float) -> Prepared:
    return prepare_images(root, out, workers=1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [("Training", "Validation", "Testing"), ("TRAIN", "Valid", "TEST")])
def test_splits_by_any_usual_name(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for name, many in zip(names, (5, 3, 2), strict=True):
        fill(tmp_path / "in", *(f"{name}/{kind}/*{many}.jpg" for kind in ("cat", "dog")))
    done = prepare(tmp_path / "in", tmp_path / "out")
    assert done.meta["classes"] == ["cat", "dog"]
    assert done.meta["counts"] == {"train": 10, "val": 6, "test": 4}


REFUSED = {
    "two folders of one split": (["train/a/1.jpg", "Val/a/1.jpg", "validation/a/1.jpg"], "both name the val split"),
    "a split without train": (["Val/a/1.jpg", "testing/a/1.jpg"], "Val is a val split, but there is"),
    "other classes": (["Train/a/1.jpg", "Val/b/1.jpg"], "classes that .*Train does not have: b"),
    "a class of no images": (["a/1.jpg", "b/1.heic", "b/2.heic"], r"no images of class 'b'.*ignored: 2 \.heic files"),
    "one image a class": (
        ["a/1.jpg", "b/1.jpg"],
        r"no class has more than 1 image\(s\), so --val-fraction 0\.1 gives no",
    ),
    "nothing to validate in train": (
        ["train/a/1.jpg"],
        "or set --val-fraction 0 for no val",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    files, said = REFUSED[case]
    fill(tmp_path / "in", *files)
    with pytest.raises(UserError, match=rf"{tmp_path}/in.*{said}"):
        prepare(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "in"
    fill(root, "Train/a/*10.jpg", "Train/b/*9.png", "Train/b/deep/1.jfif", "Val/a/1.jpg", "Val/b/1.jpg")
    fill(root, "Train/a/.ipynb_checkpoints/x*4.jpg", "__MACOSX/a/1.jpg", "Train/b/__MACOSX/1.jpg")
    fill(
        root,
        "Train/a/*3.HEIC",
        "Train/a/notes.txt",
        "Train/b/README",
        "Train/loose.jpg",
        "Val/loose.png",
        "extra/1.jpg",
    )
    fill(root, "Train/a/._0.jpg", "Train/.DS_Store", "loose.jpg", "extra/1.jpg")
    (root / "Train/a/more").symlink_to(root / "extra")
    (root / "Train/a/gone.jpg").symlink_to(root / "nowhere.jpg")
    with caplog.at_level(logging.WARNING, "mmtrain"):
        done = prepare(root, tmp_path / "out")
    assert done.meta["counts"] == {"train": 20, "val": 2}
    assert done.meta["left_out"] == {
        "images in hidden folders": 5,
        ".heic files": 3,
        "images outside of a class folder": 3,
        ".txt files": 1,
        "files without an extension": 1,
        "other folders": 2,
        "links to folders": 1,
        "broken links or special files": 1,
    }
    [said] = [record.message for record in caplog.records]
    assert said.startswith(f"{root}: ignored: 5 images in hidden folders (first: ")
    assert f"3 .heic files (first: {root}/Train/a/0.HEIC)" in said
    assert "and 2 more kinds; convert HEIC to JPEG first" in said


def test_nothing_is_said_where_all_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "in", "a/*10.jpg", "b/*10.jpg")
    with caplog.at_level(logging.WARNING, "mmtrain"):
        done = prepare(tmp_path / "in", tmp_path / "out")
    assert "left_out" not in done.meta
    assert not caplog.records


def test_classes_without_a_sample_to_validate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "in", "a/*10.jpg", "b/*2.jpg")
    with caplog.at_level(logging.WARNING, "mmtrain"):
        done = prepare(tmp_path / "in", tmp_path / "out", test_fraction=0)
    assert done.meta["counts"] == {"train": 11, "val": 1}
    assert "1 of 2 classes are too small for --val-fraction 0.1 and have no images in val: b" in caplog.text


def test_imagenet_counts_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "in"
    fill(root, "train/n00000001/*3.JPEG", "train/n00000001/x.heic", "train/n00000001/more/1.JPEG", "train/1.JPEG")
    with caplog.at_level(logging.WARNING, "mmtrain"):
        prepare_imagenet(root, tmp_path / "out", expect="any", workers=1)
    for kind in ("1 .heic files", "1 folders (first", "1 images outside of a class folder"):
        assert kind in caplog.text


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a/b/1.jpg", "a/c/1.jpg")
    sound = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return sound(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"a/b: cannot be read \(Permission denied\)"):
        image_files(tmp_path / "a", Ignored())


def test_files_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    fill(tmp_path, "b/1.jpg", "a/2.jpg", "a.jpg", "a-b.png", "a/b/1.jpg")
    found = image_files(tmp_path, Ignored(Counter()))
    assert found == sorted(tmp_path.rglob("*.*g"))
