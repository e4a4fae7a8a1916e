"""Masks that cannot be what was meant are questioned, and targets of photos that EXIF marks as turned stay on them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmtrain.data.images.photo import decode
from mmtrain.data.images.targets import read_detection, read_mask, read_samples
from mmtrain.data.prepare.masks import MaskValues, implausible, turn_array, turn_points
from mmtrain.data.prepare.targets import prepare_coco, prepare_segmentation
from mmtrain.errors import UserError

Mask = NDArray[np.uint8]


def level(value: int) -> Callable[[int], Mask]:
    """Masks of 0 with a block of ``value``."""

    def make(number: int) -> Mask:
        mask = np.zeros((24, 32), np.uint8)
        mask[4 : 12 + number, 5:20] = value
        return mask

    return make


def scene(root: Path, make: Callable[[int], Mask], suffix: str = "png", count: int = 3) -> Path:
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            mask = make(number)
            Image.new("RGB", mask.shape[::-1], (9, 60, 90)).save(root / f"images/{split}/{number}.jpg")
            Image.fromarray(mask).save(root / f"annotations/{split}/{number}.{suffix}")
    return root


def shades(number: int) -> Mask:
    return np.tile(np.array([0, 38, 75, 113], np.uint8), (24, 8))


def blurred(number: int) -> Mask:
    """Two classes, and what a smooth resize makes of the border between them."""
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 200
    mask[0, 40:90] = np.arange(100, 150)
    return mask


STRANGE: dict[str, tuple[Callable[[int], Mask], str, str]] = {
    "0 and 255": (
        level(255),
        "png",
        r"only 0 and 255.*1\d% of the pixels would be void\. If 255.*--mask-values 0,255",
    ),
    "void alone": (lambda _: np.full((24, 32), 255, np.uint8), "png", r"every pixel is void \(255\)"),
    "shades": (
        shades,
        "png",
        r"4 different numbers up to 113, which would mean 114 classes.*--mask-values 0,38,75,113; if",
    ),
    "blurred": (blurred, "png", r"52 different numbers, 39 of which together cover 0\.\d\d% of the pixels"),
    "a JPEG": (level(2), "jpg", r"0\.jpg: the mask is a JPEG, whose compression changes class numbers"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_masks_that_cannot_be_meant_are_refused(tmp_path: Path, case: str) -> None:
    make, suffix, said = STRANGE[case]
    root = scene(tmp_path / "in", make, suffix)
    with pytest.raises(UserError, match=said):
        prepare_segmentation(root, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "options", "classes"),
    [
        (level(255), {"mask_values": "0,255"}, ["0", "255"]),
        (level(255), {"mask_values": "255,0"}, ["255", "0"]),
        (shades, {"mask_values": "0,38,75,113"}, ["0", "38", "75", "113"]),
        (shades, {"mask_values": "38,75", "ignore": [0, 113]}, ["38", "75"]),
        (level(1), {}, ["0", "1"]),
        (level(7), {}, [str(number) for number in range(8)]),
    ],
    ids=["0 and 255", "255 and 0", "four shades", "ignored shades", "0 and 1", "0 to 7"],
)
def test_values_are_mapped(tmp_path: Path, make: Callable[[int], Mask], options: Any, classes: list[str]) -> None:
    root = scene(tmp_path / "in", make)
    done = prepare_segmentation(root, tmp_path / "out", workers=1, **options)
    assert done.meta["classes"] == classes
    values = [int(value) for value in options.get("mask_values", ",".join(classes)).split(",")]
    wanted = Counter(
        values.index(value) if value in values else 255
        for number in range(3)
        for value in make(number).reshape(-1).tolist()
    )
    assert done.meta["pixels"]["train"] == {str(value): wanted[value] for value in sorted(wanted)}


def test_a_jpeg_mask_takes_the_nearest_value(tmp_path: Path) -> None:
    root = scene(tmp_path / "in", level(255), "jpg")
    done = prepare_segmentation(root, tmp_path / "out", workers=1, mask_values="0,255")
    share = sum(int((level(255)(number) > 0).sum()) for number in range(3))
    assert done.meta["pixels"]["train"]["1"] == pytest.approx(share, rel=0.02)
    assert set(done.meta["pixels"]["train"]) == {"0", "1"}


def test_one_named_class_may_be_alone(tmp_path: Path) -> None:
    root = scene(tmp_path / "in", level(255))
    (tmp_path / "one.txt").write_text("road\n")
    assert prepare_segmentation(root, tmp_path / "a", workers=1, classes=tmp_path / "one.txt").meta["classes"] == [
        "road"
    ]
    (tmp_path / "two.txt").write_text("wall\ncrack\n")
    with pytest.raises(UserError, match="only 0 and 255"):
        prepare_segmentation(root, tmp_path / "b", workers=1, classes=tmp_path / "two.txt")
    done = prepare_segmentation(root, tmp_path / "b", workers=1, classes=tmp_path / "two.txt", mask_values="0,255")
    assert done.meta["classes"] == ["wall", "crack"]


def test_black_and_white_masks_are_classes_0_and_1(tmp_path: Path) -> None:
    root = scene(tmp_path / "in", level(1))
    for file in (root / "annotations").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)) > 0).save(file)  # one bit a pixel
    assert prepare_segmentation(root, tmp_path / "out", workers=1).meta["classes"] == ["0", "1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_values": "0,256"}, "distinct numbers from 0 to 255"),
        ({"mask_values": "0,0"}, "distinct numbers"),
        ({"mask_values": "a"}, "distinct numbers"),
        ({"mask_values": "0,255", "zero_is_void": True}, "must not be given together"),
        ({"mask_values": "0,7"}, r"0\.png: contains the value 38, which is not in --mask-values or --ignore"),
        ({"turned": "left"}, "--turned left: must be upright or stored"),
    ],
    ids=str,
)
def test_bad_options(tmp_path: Path, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepare_segmentation(scene(tmp_path / "in", shades), tmp_path / "out", workers=1, **options)


def test_many_rare_classes_are_no_reason_to_doubt() -> None:
    """150 classes with shares that fall as 1/n, and a part of them in a few pictures, as in ADE20K."""
    harmonic = {number: 10**7 // (number + 1) for number in range(150)}
    assert implausible(Counter(harmonic), MaskValues(), None) == ""
    some = {number: many for number, many in harmonic.items() if number % 5 == 0}
    assert implausible(Counter(some), MaskValues(), None) == ""
    assert implausible(Counter({0: 10**7, 1: 10**7, **dict.fromkeys(range(2, 60), 30)}), MaskValues(), None)


def photo(path: Path, turn: int, size: tuple[int, int]) -> Mask:
    """A photo with a bright block, marked as turned; returns the mask of the block as the pixels are stored."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[8:16, 16:40] = 1
    image = Image.fromarray(np.repeat(mask[..., None] * 230, 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = turn
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, exif=exif)
    return mask


def bright(content: bytes) -> Mask:
    return (np.asarray(decode(content, 1)) > 115).astype(np.uint8)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("size", [(64, 48), (64, 64)])
@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_masks_stay_on_turned_photos(tmp_path: Path, turn: int, size: tuple[int, int], frame: str) -> None:
    root = tmp_path / "in"
    stored = photo(root / "images/train/a.jpg", turn, size)
    (root / "annotations/train").mkdir(parents=True)
    Image.fromarray(stored if frame == "stored" else turn_array(stored, turn)).save(root / "annotations/train/a.png")
    known = turn == 1 or (turn >= 5 and size[0] != size[1])  # by the sizes
    if not known:
        with pytest.raises(UserError, match=rf"a\.png: .*EXIF orientation {turn}.*--turned upright\).*--turned stored"):
            prepare_segmentation(root, tmp_path / "out", workers=1)
    done = prepare_segmentation(root, tmp_path / "out", workers=1, turned=None if known else frame)
    [(_, sample)] = read_samples(next((done.out / "train").glob("*.tar")))
    content, mask = read_mask(sample)
    assert np.array_equal(mask, bright(content))


def outline(mask: Mask) -> dict[str, Any]:
    """COCO's run lengths of a mask."""
    flat = [0, *mask.T.reshape(-1).tolist()]
    counts = np.diff([0, *[n - 1 for n in range(1, len(flat)) if flat[n] != flat[n - 1]], len(flat) - 1])
    return {"size": list(mask.shape), "counts": counts.tolist()}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_boxes_and_outlines_stay_on_turned_photos(tmp_path: Path, turn: int, frame: str) -> None:
    stored = photo(tmp_path / "in/a.jpg", turn, (64, 48))
    mask = stored if frame == "stored" else turn_array(stored, turn)
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y, w, h = (int(v) for v in (columns[0], rows[0], len(columns), len(rows)))
    shared = {"image_id": 1, "category_id": 1, "bbox": [x, y, w, h]}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}],
        "categories": [{"id": 1, "name": "block"}],
        "annotations": [
            {"id": 1, **shared, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]},
            {"id": 2, **shared, "iscrowd": 1, "segmentation": outline(mask)},
        ],
    }
    (tmp_path / "in.json").write_text(json.dumps(content))
    options: dict[str, Any] = {"workers": 1, "turned": frame if 1 < turn < 5 else None}
    done = prepare_coco(tmp_path / "in", tmp_path / "in.json", tmp_path / "out", **options)
    [(_, sample)] = read_samples(next((done.out / "train").glob("*.tar")))
    image, found = read_detection(sample)
    seen = bright(image)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert found.size == seen.shape[::-1]
    for box in found.boxes.tolist():
        assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    corners = np.array(found.outlines[0]).reshape(-1, 2)
    assert [*corners.min(0), *corners.max(0)] == found.boxes[0].tolist()
    assert found.outlines[1] == outline(seen)


def test_a_compressed_outline_cannot_be_turned(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.jpg", 6, (64, 48))
    outline = {"size": [48, 64], "counts": "a"}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "categories": [{"id": 1, "name": "block"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [1, 1, 2, 2],
                "segmentation": outline,
            }
        ],
    }
    (tmp_path / "in.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a\.jpg: its compressed outline \(RLE\) cannot be rotated"):
        prepare_coco(tmp_path / "in", tmp_path / "in.json", tmp_path / "out", workers=1)


def test_points_turn_as_pixels_do() -> None:
    for turn in range(1, 9):
        for x, y in ((0, 0), (3, 1), (4, 2)):
            stored = np.zeros((3, 5), np.uint8)
            stored[y, x] = 1
            [[row, column]] = np.argwhere(turn_array(stored, turn)).tolist()
            middle = turn_points(np.array([[x + 0.5, y + 0.5]]), turn, (5, 3))
            assert middle.tolist() == [[column + 0.5, row + 0.5]]
