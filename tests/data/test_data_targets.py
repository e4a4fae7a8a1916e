"""Masks and boxes: from the layouts of ADE20K, CamVid and COCO into shards and back."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmtrain.data.images.targets import read_detection, read_mask, read_samples
from mmtrain.data.prepare.targets import prepare_coco, prepare_segmentation
from mmtrain.errors import UserError
from tests.conftest import ROOT
from tests.data.conftest import png

SIZE = (12, 10)


def real(name: str, folder: Path) -> Path:
    """A public image set that stands beside the checkout, unpacked."""
    archive = ROOT.parent / "shared" / "data" / "images" / f"{name}.tar.zst"
    if not archive.is_file():
        pytest.skip(f"the image set {name} is not here")
    if shutil.which("zstd") is None:
        pytest.skip("unpacking the image sets needs zstd: apt install zstd")
    subprocess.run(["tar", "--zstd", "-xf", archive, "-C", folder], check=True)
    return folder


def numbers(seed: int, top: int = 4) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, top, (SIZE[1], SIZE[0]), dtype=np.uint8)


def save_mask(path: Path, mask: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def save_photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed, SIZE, kind="JPEG"))


def ade(root: Path, count: int = 5) -> Path:
    for split, first in (("training", 0), ("validation", 100)):
        for number in range(first, first + count):
            save_photo(root / "images" / split / f"ADE_{number}.jpg", number)
            save_mask(root / "annotations" / split / f"ADE_{number}.png", numbers(number))
    return root


def masks(out: Path, split: str = "train") -> list[tuple[bytes, NDArray[np.uint8]]]:
    return [read_mask(sample) for shard in sorted((out / split).glob("*.tar")) for _, sample in read_samples(shard)]


def test_images_and_masks_stay_together(tmp_path: Path) -> None:
    root = ade(tmp_path / "in")
    done = prepare_segmentation(root, tmp_path / "out", shard_size=2, workers=1)
    assert done.meta["counts"] == {"train": 5, "val": 5}
    assert done.meta["classes"] == ["0", "1", "2", "3"]
    assert done.meta["kind"] == "segmentation"
    for split, first in (("train", 0), ("val", 100)):
        found = dict(masks(done.out, split))
        assert len(found) == 5
        for number in range(first, first + 5):
            assert np.array_equal(found[png(number, SIZE, kind="JPEG")], numbers(number))
    total = sum(np.bincount(numbers(number).ravel(), minlength=4) for number in range(5))
    assert done.meta["pixels"]["train"] == {str(value): int(total[value]) for value in range(4)}


def test_camvid_s_layout_and_palettes(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for number in range(3):
        save_photo(root / "train" / f"{number}.jpg", number)
        image = Image.fromarray(numbers(number))
        image.putpalette([value for value in range(4) for _ in range(3)])
        (root / "trainannot").mkdir(exist_ok=True)
        image.save(root / "trainannot" / f"{number}.png")
    done = prepare_segmentation(root, tmp_path / "out", workers=1)
    found = dict(masks(done.out))
    assert all(np.array_equal(found[png(n, SIZE, kind="JPEG")], numbers(n)) for n in range(3))


def test_void_and_names(tmp_path: Path) -> None:
    root = ade(tmp_path / "in")
    (tmp_path / "names.txt").write_text("sky\nroad\ntree\n")
    with pytest.raises(UserError, match="contains the class number 3, but there are only 3 classes"):
        prepare_segmentation(root, tmp_path / "a", classes=tmp_path / "names.txt", workers=1)
    ignored = prepare_segmentation(root, tmp_path / "a", classes=tmp_path / "names.txt", ignore=[3], workers=1)
    assert ignored.meta["classes"] == ["sky", "road", "tree"]
    assert ignored.meta["ignore"] == [3]
    shifted = prepare_segmentation(root, tmp_path / "b", zero_is_void=True, workers=1)
    assert shifted.meta["classes"] == ["0", "1", "2"]
    found = dict(masks(shifted.out))
    wanted = np.where(numbers(1) == 0, 255, numbers(1) - 1)
    assert np.array_equal(found[png(1, SIZE, kind="JPEG")], wanted)


def test_both_are_shrunk_alike(tmp_path: Path) -> None:
    root = tmp_path / "in"
    save_mask(root / "trainannot" / "a.png", np.repeat(np.repeat(numbers(1), 4, 0), 4, 1))
    (root / "train").mkdir()
    (root / "train" / "a.jpg").write_bytes(png(1, (48, 40), kind="JPEG"))
    done = prepare_segmentation(root, tmp_path / "out", image_size=10, workers=1)
    [(image, mask)] = masks(done.out)
    assert Image.open(io.BytesIO(image)).size == SIZE
    assert np.array_equal(mask, numbers(1))
    assert sum(done.meta["pixels"]["train"].values()) == 120


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros((10, 11), np.uint8), "its targets are for 11 × 10 pixels, but the image has 12 × 10"),
        (np.zeros((10, 12, 3), np.uint8), "the mask's mode is RGB, but class numbers need"),
        (np.full((10, 12), 300, np.uint16), "outside of the range 0 to 255"),
    ],
)
def test_bad_masks(tmp_path: Path, mask: NDArray[Any], said: str) -> None:
    root = ade(tmp_path / "in")
    save_mask(root / "annotations" / "training" / "ADE_1.png", mask)
    with pytest.raises(UserError, match=rf"ADE_1\.png: .*{said}"):
        prepare_segmentation(root, tmp_path / "out", workers=1)
    done = prepare_segmentation(root, tmp_path / "out", workers=1, skip_bad=True)
    assert done.meta["counts"] == {"train": 4, "val": 5}
    assert said in (done.out / "skipped.txt").read_text()


def test_bad_segmentation_roots(tmp_path: Path) -> None:
    root = ade(tmp_path / "in")
    (root / "annotations" / "training" / "ADE_1.png").write_bytes(b"no png")
    with pytest.raises(UserError, match=r"ADE_1\.png: the mask cannot be decoded"):
        prepare_segmentation(root, tmp_path / "out", workers=1)
    (root / "annotations" / "training" / "ADE_1.png").unlink()
    with pytest.raises(
        UserError, match=r"ADE_1\.jpg: .*annotations/training has no file of the same name without extension \(1 such"
    ):
        prepare_segmentation(root, tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"no training images with masks\. The expected layout is"):
        prepare_segmentation(tmp_path, tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="no such folder"):
        prepare_segmentation(tmp_path / "none", tmp_path / "out", workers=1)


def coco(root: Path) -> tuple[Path, dict[str, Any]]:
    for number in range(4):
        save_photo(root / f"{number}.jpg", number)
    rle = {"size": [10, 12], "counts": [5, 7, 108]}
    content = {
        "images": [{"id": 10 * n, "file_name": f"{n}.jpg", "width": 12, "height": 10} for n in (3, 1, 0, 2)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 3.5, 4], "area": 9.5, "iscrowd": 0}
            | {"segmentation": [[1, 2, 4.5, 2, 4.5, 6]]},
            {"id": 2, "image_id": 30, "category_id": 2, "bbox": [0, 0, 12, 10], "area": 7, "iscrowd": 1}
            | {"segmentation": rle},
            {"id": 3, "image_id": 10, "category_id": 2, "bbox": [0, 1, 2, 3]},
        ],
    }
    return root, content


def prepare_boxes(root: Path, content: Any, out: Path, **options: Any) -> Any:
    file = root.parent / "instances.json"
    file.write_text(json.dumps(content))
    return prepare_coco(root, file, out, workers=1, **options)


def detections(out: Path, split: str = "train") -> dict[bytes, Any]:
    shards = sorted((out / split).glob("*.tar"))
    return dict(read_detection(sample) for shard in shards for _, sample in read_samples(shard))


def test_boxes_stay_with_their_images(tmp_path: Path) -> None:
    root, content = coco(tmp_path / "in")
    done = prepare_boxes(root, content, tmp_path / "out", shard_size=2)
    assert (done.meta["classes"], done.meta["category_ids"]) == (["cat", "dog"], [2, 7])
    assert done.meta["boxes"] == {"train": {"0": 2, "1": 1}}
    found = detections(done.out)
    assert len(found) == 4
    two = found[png(1, SIZE, kind="JPEG")]
    assert (two.image_id, two.size) == (10, (12, 10))
    assert two.boxes.tolist() == [[1, 2, 4.5, 6], [0, 1, 2, 4]]
    assert two.labels.tolist() == [1, 0]
    assert two.areas.tolist() == [9.5, 6]
    assert two.outlines == [[[1, 2, 4.5, 2, 4.5, 6]], []]
    crowd = found[png(3, SIZE, kind="JPEG")]
    assert crowd.crowd.tolist() == [True]
    assert crowd.outlines == [{"size": [10, 12], "counts": [5, 7, 108]}]
    none = found[png(0, SIZE, kind="JPEG")]
    assert none.boxes.shape == (0, 4)
    assert none.labels.dtype == np.int64


def test_validation_boxes_have_the_same_categories(tmp_path: Path) -> None:
    root, content = coco(tmp_path / "in")
    val = tmp_path / "val.json"
    val.write_text(json.dumps(content))
    done = prepare_boxes(root, content, tmp_path / "out", val_images=root, val_annotations=val)
    assert done.meta["counts"] == {"train": 4, "val": 4}
    assert len(detections(done.out, "val")) == 4
    val.write_text(json.dumps(content | {"categories": [*content["categories"], {"id": 9, "name": "eel"}]}))
    with pytest.raises(UserError, match=r"val\.json: the categories differ from"):
        prepare_boxes(root, content, tmp_path / "b", val_images=root, val_annotations=val)
    with pytest.raises(UserError, match="must be given together"):
        prepare_boxes(root, content, tmp_path / "b", val_images=root)


BOX = {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": None}, "no list 'images'"),
        ({"categories": []}, "no categories"),
        ({"categories": [{"id": 7, "name": "dog"}, {"id": 7, "name": "cat"}]}, "a category id is repeated"),
        ({"images": [{"id": 1, "file_name": "../0.jpg", "width": 12, "height": 10}]}, r"'\.\./0\.jpg' is outside of"),
        ({"images": [{"id": 1, "file_name": "/0.jpg", "width": 12, "height": 10}]}, "is outside of"),
        ({"images": [{"id": 1}]}, 'each image must have "id", "file_name"'),
        ({"images": [{"id": 1, "file_name": "x.jpg", "width": 12, "height": 10}], "annotations": []}, "1 of 1 images"),
        (
            {"images": [{"id": 10, "file_name": "1.jpg", "width": 13, "height": 10}]},
            "are for 13 × 10 pixels",
        ),
        ({"annotations": [BOX | {"image_id": 5}]}, "annotation 1: its image or category does not exist"),
        ({"annotations": [BOX | {"category_id": 5}]}, "annotation 1: its image or category does not exist"),
        ({"annotations": [BOX | {"bbox": [1, 2, 3]}]}, 'annotation 1: must have a "bbox"'),
        ({"annotations": [BOX | {"bbox": [1, 2, -3, 4]}]}, "must not be negative"),
        ({"annotations": [BOX | {"bbox": [1, 2, 3, float("nan")]}]}, "must be finite"),
        ({"annotations": [BOX | {"segmentation": [[1, 2, 3]]}]}, "must be polygons"),
        ({"annotations": [BOX | {"segmentation": {"size": [12, 10], "counts": []}}]}, "with the size of the image"),
        ({"annotations": [BOX | {"iscrowd": float("inf")}]}, 'annotation 1: must have a "bbox"'),
        ({"categories": [{"id": float("inf"), "name": "dog"}]}, 'each category must have "id"'),
        (
            {"images": [{"id": 1, "file_name": "1.jpg", "width": float("inf"), "height": 10}]},
            'each image must have "id"',
        ),
        ([], "no list 'images'"),
    ],
)
def test_bad_annotations(tmp_path: Path, change: Any, said: str) -> None:
    root, content = coco(tmp_path / "in")
    if isinstance(change, dict) and "images" in change:
        content["annotations"] = []
    content = content | change if isinstance(change, dict) else change
    with pytest.raises(UserError, match=said):
        prepare_boxes(root, content, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_annotations_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"images": [')
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        prepare_coco(tmp_path, tmp_path / "a.json", tmp_path / "out")
    with pytest.raises(UserError, match="cannot read the annotations"):
        prepare_coco(tmp_path, tmp_path / "none.json", tmp_path / "out")


def test_damaged_shards_and_samples(tmp_path: Path) -> None:
    root, content = coco(tmp_path / "in")
    done = prepare_boxes(root, content, tmp_path / "out")
    [shard] = (done.out / "train").glob("*.tar")
    raw = shard.read_bytes()
    for cut in (0, 700, 1024, len(raw) // 2):
        shard.write_bytes(raw[:cut])
        with pytest.raises(UserError, match=r"empty|truncated"):
            list(read_samples(shard))
    with pytest.raises(UserError, match="cannot read the shard"):
        list(read_samples(tmp_path / "none.tar"))
    photo = {"jpg": png(0, SIZE, kind="JPEG")}
    for read, sample, said in (
        (read_mask, photo, r"no \.seg\.png\. Create shards with `mmtrain data prepare segmentation"),
        (read_mask, photo | {"seg.png": b"x"}, "the mask cannot be decoded"),
        (read_mask, photo | {"seg.png": png(0)}, "its mode is RGB"),
        (read_detection, photo, r"no \.json"),
        (read_detection, photo | {"json": b"{}"}, "not valid annotations of an image"),
        (read_detection, photo | {"json": b'{"labels": [1], "image_id": 1, "width": 1, "height": 1}'}, "not valid ann"),
    ):
        with pytest.raises(UserError, match=said):
            read(sample)


def test_real_street_scenes(tmp_path: Path) -> None:
    root = real("camvid_jpg90", tmp_path)
    for folder in ("test", "testannot", "val", "valannot"):
        shutil.rmtree(root / folder)
    for path in sorted((root / "train").iterdir())[20:]:
        path.unlink()
        (root / "trainannot" / f"{path.stem}.png").unlink()
    done = prepare_segmentation(root, tmp_path / "out", ignore=[11], shard_size=10, workers=1)
    assert done.meta["counts"] == {"train": 20}
    assert len(done.meta["classes"]) == 11
    found = dict(masks(done.out))
    for path in (root / "train").iterdir():
        right = np.asarray(Image.open(root / "trainannot" / f"{path.stem}.png"))
        assert np.array_equal(found[path.read_bytes()], right)


def test_real_coco_images(tmp_path: Path) -> None:
    root = real("coco128", tmp_path)
    file = root / "instances_train2017.json"
    done = prepare_coco(root / "train2017", file, tmp_path / "out", workers=1)
    content = json.loads(file.read_text())
    assert done.meta["counts"]["train"] == len(content["images"])
    assert sum(done.meta["boxes"]["train"].values()) == len(content["annotations"])
    found = {detection.image_id: (image, detection) for image, detection in detections(done.out).items()}
    for entry in content["images"]:
        image, detection = found[entry["id"]]
        wanted = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
        assert image == (root / "train2017" / entry["file_name"]).read_bytes()
        assert [done.meta["category_ids"][label] for label in detection.labels] == [a["category_id"] for a in wanted]
        boxes = np.array([a["bbox"] for a in wanted], dtype=np.float64).reshape(-1, 4)
        assert np.allclose(detection.boxes[:, :2], boxes[:, :2], atol=1e-3)
        assert np.allclose(detection.boxes[:, 2:] - detection.boxes[:, :2], boxes[:, 2:], atol=1e-3)
        assert detection.outlines == [a["segmentation"] for a in wanted]
        assert detection.crowd.tolist() == [bool(a["iscrowd"]) for a in wanted]


def test_commands(cli: Any, tmp_path: Path) -> None:
    root = ade(tmp_path / "in")
    words = ("data", "prepare", "segmentation", "--root", root, "--out", "masks", "--ignore", "3", "--ignore", "255")
    done = cli(*words, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "masks: 5 train, 5 val; 3 classes; written" in done.stdout
    images, content = coco(tmp_path / "photos")
    (tmp_path / "c.json").write_text(json.dumps(content))
    words = ("data", "prepare", "coco", "--images", images, "--annotations", "c.json", "--out", "boxes")
    done = cli(*words, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "boxes: 4 train; 2 classes; written" in done.stdout
    os.unlink(images / "2.jpg")
    failed = cli(*words, "--force")
    assert failed.returncode == 2
    assert "1 of 4 images are missing: 2.jpg" in failed.stderr
