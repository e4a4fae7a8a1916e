"""Image shards: decoding of every colour mode, augmentation by key alone, and faults that name the sample."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmtrain.config import ShardsDataConfig
from mmtrain.data.core.loader import eval_batches
from mmtrain.data.core.order import mix64
from mmtrain.data.core.source import Source
from mmtrain.data.images.photo import decode
from mmtrain.data.images.shards import ImageShards, find_shards
from mmtrain.data.images.transforms import _posterize, build_transform
from mmtrain.data.open import open_images
from mmtrain.errors import UserError

GREY: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def level(value: int, size: int = 8) -> np.ndarray:
    return np.full((size, size), value, dtype=np.uint8)


def colour_cases() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    palette = Image.fromarray(np.dstack([level(200), level(10), level(60)])).quantize(4)
    translucent = np.dstack([level(200), level(10), level(60), level(77)])
    return {
        "grey": (save(Image.fromarray(level(90))), (90, 90, 90)),
        "black and white": (save(Image.fromarray(level(255)).convert("1")), (255, 255, 255)),
        "grey with alpha": (save(Image.fromarray(np.dstack([level(90), level(3)]), "LA")), (90, 90, 90)),
        "palette": (save(palette), (200, 10, 60)),
        "palette with transparency": (save(palette, transparency=bytes([0, 255])), (200, 10, 60)),
        "RGBA": (save(Image.fromarray(translucent)), (200, 10, 60)),
        "CMYK jpeg": (save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
        "16-bit grey": (save(Image.fromarray(np.full((8, 8), 0x8040, dtype=np.uint16))), (0x80, 0x80, 0x80)),
        "webp": (save(Image.new("RGB", (8, 8), (200, 10, 60)), "WEBP", lossless=True), (200, 10, 60)),
    }


@pytest.mark.parametrize("case", list(colour_cases()))
def test_every_mode_becomes_rgb(case: str) -> None:
    content, expected = colour_cases()[case]
    image = decode(content)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 4  # JPEG rounds
    assert decode(content, channels=1).mode == "L"


def test_fetch_reads_normalises_and_keeps_the_order(make_tar: Callable) -> None:
    values = [0, 50, 100, 150, 200, 250]
    for shard in range(2):
        members = []
        for number in range(3 * shard, 3 * shard + 3):
            members += [
                (f"{number}.png", save(Image.fromarray(level(values[number])))),
                (f"{number}.cls", b"%d" % number),
            ]
        make_tar(members, f"train/shard-{shard:06d}.tar")
    path = find_shards(make_tar(members, "train/shard-000001.tar").parent)
    source = ImageShards(path, image_size=8, train=False, **GREY)
    assert isinstance(source, Source)
    assert (source.block_sizes, len(source), source.num_classes) == ([3, 3], 6, None)
    batch = source.fetch(np.array([4, 0, 5, 0]), None)
    assert batch["label"].tolist() == [4, 0, 5, 0]
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    expected = [(values[n] / 255 - 0.5) / 0.25 for n in (4, 0, 5, 0)]
    assert batch["image"][:, 1, 3, 3].tolist() == pytest.approx(expected, abs=1e-5)
    assert source.fetch(np.array([], dtype=np.int64), None)["image"].shape == (0, 3, 8, 8)


def test_evaluation_resizes_and_crops_like_timm() -> None:
    from mmtrain.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from timm.data import create_transform

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    theirs = create_transform(
        24, is_training=False, crop_pct=0.9, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3
    )
    ours = build_transform(False, 24, crop_pct=0.9, **GREY)
    assert torch.allclose(ours([image], None)[0], theirs(image), atol=1e-5)


def test_grey_images_in_one_channel(make_tar: Callable, samples: Callable) -> None:
    shard = make_tar(samples(4))
    source = ImageShards(shard, image_size=16, train=True, augment="light", channels=1, mean=[0.5], std=[0.5])
    assert source.fetch(np.arange(4), mix64(np.arange(4)))["image"].shape == (4, 1, 16, 16)
    with pytest.raises(UserError, match="colour images"):
        ImageShards(shard, image_size=16, train=True, augment="imagenet", channels=1, mean=[0.5], std=[0.5])
    with pytest.raises(UserError, match=r"data\.mean"):
        ImageShards(shard, image_size=16, train=True, channels=1, **GREY)


@pytest.mark.parametrize("augment", ["light", "imagenet"])
def test_augmentation_is_a_function_of_the_key(augment: str) -> None:
    images = [Image.open(io.BytesIO(colour_cases()["RGBA"][0])).convert("RGB").resize((20, 20))] * 6
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))] * 6
    transform = build_transform(True, 16, augment, **GREY)
    keys = mix64(9, np.array([1, 2, 3, 4, 5, 1]))
    batch = transform(images, keys)
    assert torch.equal(batch[0], batch[5])
    assert len({one.numpy().tobytes() for one in batch}) == 5
    for place in range(6):  # whatever shares the batch
        assert torch.equal(transform(images[:1], keys[place : place + 1])[0], batch[place])
    random.seed(4)
    assert torch.equal(transform(images, keys), batch)  # nor on the global state


def test_light_moves_an_image_a_little() -> None:
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[12:20, 12:20] = 255
    transform = build_transform(True, 32, "light", mean=[0.0] * 3, std=[1.0] * 3)
    keys = mix64(3, np.arange(500))
    batch = transform([Image.fromarray(picture)] * 500, keys)[:, 0].double()
    grid = torch.arange(32, dtype=torch.float64)
    mass = batch.sum((1, 2))
    x, y = ((batch.sum(axis) * grid).sum(1) / mass - 15.5 for axis in (1, 2))
    for shift in (x, y):
        assert shift.abs().max() <= 0.08 * 32 + 0.1
        assert shift.abs().max() > 0.07 * 32
        assert abs(float(shift.mean())) < 0.25
    assert mass.min() >= 64 * 0.9**2 * 0.97
    assert mass.max() <= 64 * 1.1**2 * 1.03
    assert mass.max() / mass.min() > 1.3
    plain = transform([Image.fromarray(picture)], None)
    assert torch.equal(plain, torch.from_numpy(picture / 255).float().permute(2, 0, 1)[None])


def test_imagenet_survives_its_strongest_posterize() -> None:
    image = Image.fromarray(level(200)).convert("RGB")
    assert np.asarray(_posterize(image, 0)).max() == 0
    assert np.asarray(_posterize(image, 1)).max() == 128
    assert _posterize(image, 8) is image
    transform = build_transform(True, 16, "imagenet", auto_augment="rand-m10-n4-inc1", **GREY)
    assert transform([image] * 200, mix64(np.arange(200))).isfinite().all()  # level 10: posterize to 0 bits


@pytest.mark.timed
def test_light_digits_are_fast(digits: Path) -> None:
    source = ImageShards(digits / "train", image_size=32, train=True, augment="light", **GREY)
    indices, threads = np.arange(256), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source.fetch(indices, mix64(indices))
        begin = time.process_time()
        for _ in range(4):
            source.fetch(indices, mix64(indices))
        assert 4 * 256 / (time.process_time() - begin) > 3000
    finally:
        torch.set_num_threads(threads)


def test_a_pickled_source_reads_on(digits: Path) -> None:
    source = ImageShards(digits / "val", image_size=32, train=False, **GREY)
    expected = source.fetch(np.arange(5), None)["image"]
    assert torch.equal(pickle.loads(pickle.dumps(source)).fetch(np.arange(5), None)["image"], expected)


def test_open_files_are_few_and_closed(make_tar: Callable, samples: Callable) -> None:
    for number in range(40):
        folder = make_tar(samples(1), f"train/{number:02d}.tar").parent
    source = ImageShards(folder, image_size=8, train=False, **GREY)
    before = len(os.listdir("/proc/self/fd"))
    source.fetch(np.arange(40), None)
    assert len(os.listdir("/proc/self/fd")) - before == 32
    del source
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_corrupt_image_is_named(
    make_tar: Callable, samples: Callable, image_bytes: Callable, kind: str, workers: int
) -> None:
    good = image_bytes(kind=kind, size=(40, 40))
    bad = good[: len(good) // 2]
    shard = make_tar([*samples(2), ("broken.cls", b"1"), (f"broken.{kind.lower()}", bad)])
    source = ImageShards(shard.parent, image_size=8, train=False, **GREY)
    with pytest.raises(UserError, match=r"shard-000000\.tar, sample 'broken': .*cannot be decoded.*prepare") as caught:
        list(eval_batches(source, batch_size=2, workers=workers))
    assert "Traceback" not in str(caught.value)


def test_a_shard_cut_short_during_the_run(make_tar: Callable, samples: Callable) -> None:
    shard = make_tar(samples(3))
    source = ImageShards(shard, image_size=8, train=False, **GREY)
    shard.write_bytes(shard.read_bytes()[:1024])
    with pytest.raises(UserError, match="truncated"):
        source.fetch(np.arange(3), None)


def test_where_shards_are_looked_for(make_tar: Callable, samples: Callable, tmp_path: Path) -> None:
    first = make_tar(samples(1), "set/train/shard-000000.tar")
    second = make_tar(samples(1), "set/train/shard-000001.tar")
    root = tmp_path / "set"
    assert find_shards(root / "train") == [first, second]
    assert find_shards(f"{root}/train/shard-{{000000..000001}}.tar") == [first, second]
    assert find_shards([second, str(first)]) == [second, first]
    with pytest.raises(UserError, match=r"no \*\.tar shards .*subfolders train contain shards.*mmtrain data prepare"):
        find_shards(root)
    with pytest.raises(
        UserError, match=r"set/trian: no such folder or shard .*mean 'train'.*mmtrain data prepare images .*/set`"
    ):
        find_shards(root / "trian")
    with pytest.raises(UserError, match=r"2 of 4 shards are missing .*shard-000002"):
        find_shards(f"{root}/train/shard-{{000000..000003}}.tar")
    with pytest.raises(UserError, match="not a valid brace pattern"):
        find_shards("{a,b")


def test_classes_come_from_meta_json(make_tar: Callable, samples: Callable, tmp_path: Path) -> None:
    shard, meta = make_tar(samples(6, classes=3)), tmp_path / "meta.json"
    meta.write_text(json.dumps({"classes": ["cat", "dog", "eel"]}))
    source = ImageShards(shard.parent, image_size=8, train=False, **GREY)
    assert (source.num_classes, source.classes) == (3, ["cat", "dog", "eel"])
    meta.write_text(json.dumps({"classes": ["cat", "dog"]}))
    with pytest.raises(UserError, match=r"sample '000002': label 2, but meta\.json lists 2 classes"):
        ImageShards(shard.parent, image_size=8, train=False, **GREY)
    meta.write_text("{")
    with pytest.raises(UserError, match=r"meta\.json: cannot be read"):
        ImageShards(shard.parent, image_size=8, train=False, **GREY)


def test_unknown_augmentation_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"data\.augment='imagnet'.*mean 'imagenet'"):
        build_transform(True, 8, "imagnet", **GREY)


def test_indexes_are_made_silently(make_tar: Callable, samples: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ImageShards(make_tar(samples(2)), image_size=8, train=False, **GREY)
    assert not caplog.records


@pytest.mark.slow
def test_torchvision_and_timm_import_after_the_shim() -> None:
    code = (
        "from mmtrain.torchvision_compat import ensure_torchvision as e; e(); e()\n"
        "import torch, torchvision, timm\n"
        "from torchvision.transforms import v2\n"
        "assert hasattr(torch.ops.torchvision, 'nms')\n"
        "print(timm.create_model('resnet18').num_classes)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1000"


def test_a_root_that_is_missing_or_not_set_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: there is no folder .*nowhere\. Create it with"):
        open_images(ShardsDataConfig(root=str(tmp_path / "nowhere")), 3, 0)
    with pytest.raises(UserError, match=r"data\.root: it is not set\. Create it with .*--out FOLDER"):
        open_images(ShardsDataConfig(), 3, 0)


def test_labels_that_begin_at_one_are_named(make_tar: Callable, image_bytes: Callable, tmp_path: Path) -> None:
    members = [
        (f"{number}.{kind}", image_bytes() if kind == "png" else b"%d" % (1 + number % 2))
        for number in range(4)
        for kind in ("png", "cls")
    ]
    for split in ("train", "val"):
        make_tar(members, f"{split}/a.tar")
    config = ShardsDataConfig(root=str(tmp_path), image_size=8)
    with pytest.raises(
        UserError, match=r"a\.tar, sample '1': label 2, but model\.num_classes is 2 .*begin at 1: prepare"
    ):
        open_images(config, 2, 0)
    assert len(open_images(config, 3, 0).train) == 4
