"""ImageNet's layouts, labels and odd files, on trees of a few images."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmtrain.data.images.shards import ImageShards
from mmtrain.data.images.tar_index import index_shard
from mmtrain.data.prepare import imagenet
from mmtrain.data.prepare.imagenet import official_wnids, prepare_imagenet, read_devkit, read_val_labels
from mmtrain.errors import UserError

WNIDS = ["n01440764", "n01443537", "n01484850"]
NAMES = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark"]
#: The devkit's ids are in another order: id 1 is the last class here.
IDS = {1: WNIDS[2], 2: WNIDS[0], 3: WNIDS[1]}


def photo(colour: int, size: tuple[int, int] = (24, 18), mode: str = "RGB", kind: str = "JPEG") -> bytes:
    """One colour for each class, so that labels can be seen in the pixels."""
    pixels = np.full((size[1], size[0], 3), 20 + 100 * colour, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """ROOT/train with 4 images of each of 3 classes; returns ROOT."""
    root = tmp_path / "in"
    fill_train(root / "train")
    return root


def fill_train(folder: Path) -> None:
    for label, wnid in enumerate(WNIDS):
        (folder / wnid).mkdir(parents=True)
        for number in range(4):
            (folder / wnid / f"{wnid}_{number}.JPEG").write_bytes(photo(label))


def flat_val(folder: Path) -> list[int]:
    """6 images without class folders; returns their classes."""
    folder.mkdir(parents=True)
    labels = [2, 0, 1, 1, 2, 0]
    for number, label in enumerate(labels, 1):
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(photo(label))
    return labels


def prepare(root: Path, **options: Any) -> Any:
    options = {"expect": "any", "workers": 1, **options}
    return prepare_imagenet(root, root.parent / "out", **options)


def labels_fit_the_pixels(out: Path, split: str, count: int) -> None:
    source = ImageShards(out / split, image_size=8, train=False, mean=[0.0] * 3, std=[1.0] * 3)
    assert len(source) == count
    batch = source.fetch(np.arange(count), None)
    seen = ((batch["image"].mean(dim=(1, 2, 3)) * 255 - 20) / 100).round()
    assert seen.tolist() == batch["label"].tolist()


def test_class_folders(train: Path) -> None:
    for label, wnid in enumerate(WNIDS[:2]):
        (train / "val" / wnid).mkdir(parents=True)
        (train / "val" / wnid / f"ILSVRC2012_val_0000000{label}.JPEG").write_bytes(photo(label))
    done = prepare(train)
    assert json.loads((done.out / "meta.json").read_text())["classes"] == WNIDS
    assert done.meta["counts"] == {"train": 12, "val": 2}
    assert "names" not in done.meta
    labels_fit_the_pixels(done.out, "train", 12)
    labels_fit_the_pixels(done.out, "val", 2)
    assert not prepare(train).fresh


def test_kaggle_s_layout(tmp_path: Path) -> None:
    root = tmp_path / "in"
    fill_train(root / "ILSVRC" / "Data" / "CLS-LOC" / "train")
    labels = flat_val(root / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    rows = [f"ILSVRC2012_val_{n:08d},{WNIDS[label]} 1 2 3 4 " for n, label in enumerate(labels, 1)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)) + "\n")
    mapping = "".join(f"{wnid} {name}\n" for wnid, name in zip(WNIDS, NAMES, strict=True))
    (root / "LOC_synset_mapping.txt").write_text(mapping)
    for given, out in ((root, "a"), (root / "ILSVRC", "b")):
        done = prepare_imagenet(given, tmp_path / out, expect="any", workers=1)
        assert done.meta["counts"] == {"train": 12, "val": 6}
        assert done.meta["names"] == NAMES
        labels_fit_the_pixels(done.out, "val", 6)


def wnid_lines(labels: list[int]) -> str:
    return "".join(f"{WNIDS[label]}\n" for label in labels)


def index_lines(labels: list[int]) -> str:
    return "".join(f"{label}\n" for label in labels)


def pair_lines(labels: list[int]) -> str:
    pairs = [f"ILSVRC2012_val_{n:08d}.JPEG {WNIDS[label]}\n" for n, label in enumerate(labels, 1)]
    return "".join(reversed(pairs))


@pytest.mark.parametrize("lines", [wnid_lines, index_lines, pair_lines])
def test_a_flat_val_folder_with_labels(train: Path, lines: Callable[[list[int]], str]) -> None:
    labels = flat_val(train / "val")
    (train.parent / "labels.txt").write_text(lines(labels))
    with pytest.raises(UserError, match=r"6 images without class folders\. Set --val-labels"):
        prepare(train)
    done = prepare(train, val_labels=train.parent / "labels.txt")
    labels_fit_the_pixels(done.out, "val", 6)


def write_devkit(folder: Path) -> None:
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    leaves = [(number, wnid, NAMES[WNIDS.index(wnid)], 0) for number, wnid in IDS.items()]
    synsets = np.array([*leaves, (4, "n00001740", "entity", 3)], dtype=fields)
    folder.mkdir(parents=True)
    savemat(str(folder / "meta.mat"), {"synsets": synsets.reshape(-1, 1)})


def devkit_ids(labels: list[int]) -> str:
    back = {wnid: number for number, wnid in IDS.items()}
    return "".join(f"{back[WNIDS[label]]}\n" for label in labels)


def test_the_devkit_s_ids_need_its_list(train: Path) -> None:
    labels = flat_val(train / "val")
    data = train / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(devkit_ids(labels))
    with pytest.raises(
        UserError, match=r"ILSVRC ids of the devkit, whose order differs from the class indices\. Set --devkit"
    ):
        prepare(train)
    (train.parent / "ids.txt").write_text(devkit_ids(labels))
    with pytest.raises(UserError, match="Set --devkit"):  # seen in the numbers: there is a 3, and no 0
        prepare(train, val_labels=train.parent / "ids.txt")
    (train.parent / "synsets.txt").write_text("".join(f"{IDS[number]}\n" for number in (1, 2, 3)))
    done = prepare(train, val_labels=train.parent / "ids.txt", devkit=train.parent / "synsets.txt")
    labels_fit_the_pixels(done.out, "val", 6)


def test_the_devkit_s_meta_mat(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="reading meta.mat needs SciPy .* pip install scipy")
    labels = flat_val(train / "val")
    data = train / "ILSVRC2012_devkit_t12" / "data"
    write_devkit(data)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(devkit_ids(labels))
    done = prepare(train)
    assert done.meta["names"] == NAMES
    labels_fit_the_pixels(done.out, "val", 6)
    assert read_devkit(train)[0] == IDS
    (data / "meta.mat").write_bytes(b"not matlab's" * 50)
    with pytest.raises(UserError, match=r"cannot be read as the meta\.mat"):
        read_devkit(data / "meta.mat")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"needs SciPy .* pip install scipy"):
        read_devkit(data / "meta.mat")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "contains no labels"),
        ("0\n1\n", "2 labels for 6 images"),
        ("0\n" * 5 + "7\n", "line 6: '7' is not one of the 3 training classes"),
        ("n01440764\n" * 5 + "n99999999\n", "line 6: 'n99999999' is not one"),
        ("0\n" * 5 + "a 0\n", "line 6: 'a 0'"),
        ("a 0\n" * 2, "'a' is repeated"),
        ("a 0\nb 1\n", r"6 image\(s\) have no label: ILSVRC2012_val_00000001\.JPEG"),
        ("a b c\n", "line 1: 'a b c'"),
        ("1\n2\n3\n1\n2\n3\n", "Set --devkit"),
        ("-1\n" * 6, "'-1' is not one"),
        ("²\n" * 6, "line 1: '²' is not one"),
        ("9" * 5000 + "\n" + "0\n" * 5, "line 1: '999"),
    ],
)
def test_bad_labels(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.txt").write_text(text, encoding="utf-8")
    files = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 7)]
    with pytest.raises(UserError, match=said):
        read_val_labels(tmp_path / "labels.txt", files, WNIDS, None)


def test_odd_files_of_the_real_set(train: Path) -> None:
    """A PNG and CMYK files that are called .JPEG, greys, and what is too large."""
    folder = train / "train" / WNIDS[1]
    for file in folder.iterdir():
        file.unlink()
    (folder / "png.JPEG").write_bytes(photo(1, kind="PNG"))
    (folder / "cmyk.JPEG").write_bytes(photo(1, mode="CMYK"))
    (folder / "big_cmyk.JPEG").write_bytes(photo(1, size=(80, 40), mode="CMYK"))
    (folder / "grey.JPEG").write_bytes(photo(1, mode="L"))
    (folder / "big.JPEG").write_bytes(photo(1, size=(40, 60)))
    (folder / "long.JPEG").write_bytes(photo(1, size=(300, 18)))
    done = prepare(train, image_size=20, quality=80)
    labels_fit_the_pixels(done.out, "train", 14)
    index = index_shard(done.out / "train" / "shard-000000.tar")
    raw = index.path.read_bytes()
    images = [Image.open(io.BytesIO(raw[o : o + s])) for o, s in zip(index.offsets, index.sizes, strict=True)]
    found = sorted((i.format, i.mode, i.size) for i, label in zip(images, index.labels, strict=True) if label == 1)
    assert found == [
        ("JPEG", "L", (24, 18)),
        ("JPEG", "RGB", (20, 30)),
        ("JPEG", "RGB", (24, 18)),
        ("JPEG", "RGB", (40, 20)),
        ("JPEG", "RGB", (300, 18)),
        ("PNG", "RGB", (24, 18)),
    ]


def test_bad_images(train: Path) -> None:
    (train / "train" / WNIDS[0] / "bad.JPEG").write_bytes(photo(0)[:100])
    (train / "train" / WNIDS[2] / "empty.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match=r"(bad|empty)\.JPEG: the image cannot be decoded"):
        prepare(train, shard_size=2)
    done = prepare(train, shard_size=2, skip_bad=True)
    assert done.meta["counts"] == {"train": 12}
    skipped = (done.out / "skipped.txt").read_text()
    assert f"{WNIDS[0]}/bad.JPEG: the image cannot be decoded" in skipped
    assert f"{WNIDS[2]}/empty.JPEG" in skipped
    labels_fit_the_pixels(done.out, "train", 12)


def test_each_file_is_read_once(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda self: (seen.append(self.name), read(self))[1])
    prepare(train, image_size=4)
    names = [name for name in seen if name.endswith(".JPEG")]
    assert len(names) == len(set(names)) == 12


def small_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ImageNet had 3 classes of 4 images, and 6 for validation."""
    for name, value in (("TRAIN", 12), ("VAL", 6), ("_VAL_OF_CLASS", 2), ("_LEAST_OF_CLASS", 4)):
        monkeypatch.setattr(imagenet, name, value)
    monkeypatch.setattr(imagenet, "official_wnids", lambda: list(WNIDS))


def test_the_whole_of_imagenet_is_wanted(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        prepare(train, expect="full")
    said = str(caught.value)
    if importlib.util.find_spec("timm") is not None:
        assert re.search(r"missing classes: n01491361, .* \(997\)", said)
    assert "12 training images instead of 1,281,167" in said
    assert "0 validation images instead of 50,000; missing files: ILSVRC2012_val_00000001.JPEG" in said
    assert "use --expect any" in said
    small_imagenet(monkeypatch)
    (train.parent / "labels.txt").write_text(wnid_lines(flat_val(train / "val")))
    labels = {"val_labels": train.parent / "labels.txt", "expect": "full"}
    (train / "val" / "ILSVRC2012_val_00000003.JPEG").rename(train / "kept")
    (train.parent / "labels.txt").write_text(wnid_lines([2, 0, 1, 2, 0]))
    with pytest.raises(UserError, match=r"5 validation images instead of 6; missing files: ILSVRC2012_val_0+3\.JPEG\."):
        prepare(train, **labels)
    (train / "kept").rename(train / "val" / "ILSVRC2012_val_00000003.JPEG")
    (train.parent / "labels.txt").write_text(wnid_lines([2, 0, 1, 2, 0, 0]))
    with pytest.raises(UserError, match="do not have exactly 2 validation images"):
        prepare(train, **labels)
    (train.parent / "labels.txt").write_text(wnid_lines([2, 0, 1, 2, 0, 1]))
    lost = train / "train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG"
    lost.rename(train / "kept")
    with pytest.raises(UserError, match=rf"11 training images instead of 12; classes with .*: {WNIDS[1]} \(3\)"):
        prepare(train, **labels)
    (train / "kept").rename(lost)
    assert prepare(train, **labels).meta["counts"] == {"train": 12, "val": 6}


def test_kaggle_s_list_names_the_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_imagenet(monkeypatch)
    root = tmp_path / "in"
    fill_train(root / "ILSVRC" / "Data" / "CLS-LOC" / "train")
    lists = root / "ILSVRC" / "ImageSets" / "CLS-LOC"
    lists.mkdir(parents=True)
    files = [f"{wnid}/{wnid}_{number} 1" for wnid in WNIDS for number in range(4)]
    (lists / "train_cls.txt").write_text("\n".join(files) + "\n")
    (root / "ILSVRC" / "Data" / "CLS-LOC" / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").unlink()
    with pytest.raises(UserError, match=rf"missing files: {WNIDS[0]}/{WNIDS[0]}_1\.JPEG;"):
        prepare(root, expect="full")


def test_the_official_classes() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    wnids = official_wnids()
    assert len(set(wnids)) == 1000
    assert wnids == sorted(wnids)
    assert wnids[:3] == ["n01440764", "n01443537", "n01484850"]


def test_bad_roots(train: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        prepare(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder of training images"):
        prepare(tmp_path / "empty")
    (tmp_path / "empty" / "train").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        prepare(tmp_path / "empty")
    (tmp_path / "empty" / "train" / "cat").mkdir()
    with pytest.raises(UserError, match=r"names of some folders are not WNIDs: cat\. For other classes"):
        prepare(tmp_path / "empty")
    (train / "val" / "n99999999").mkdir(parents=True)
    with pytest.raises(UserError, match=r"classes that .* does not have: n99999999"):
        prepare(train)
    (train / "val" / "loose.JPEG").write_bytes(photo(0))
    with pytest.raises(UserError, match="both class folders and images"):
        prepare(train)
    for options, said in (
        ({"expect": "some"}, "full or any"),
        ({"quality": 0}, "1 to 100"),
        ({"image_size": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(train, **options)


def test_the_command(cli: Any, train: Path) -> None:
    refused = cli("data", "prepare", "imagenet", "--root", train, "--out", "set")
    assert refused.returncode == 2
    assert "not the complete ImageNet" in refused.stderr
    (train / "train" / WNIDS[0] / "bad.JPEG").write_bytes(b"x")
    words = ("data", "prepare", "imagenet", "--root", train, "--out", "set", "--expect", "any", "--workers", "1")
    failed = cli(*words)
    assert failed.returncode == 2
    assert "bad.JPEG: the image cannot be decoded" in failed.stderr
    done = cli(*words, "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "set: 12 train; 3 classes; written" in done.stdout
    assert "1 unusable samples were left out: see set/skipped.txt" in done.stderr
