"""What FFCV's images become: the draws of the data clock, crops and flips as torchvision's, brightness too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from beton_cases import LOOK, SIZE, Made, make, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.data.core.order import mix64
from mmtrain.data.ffcv.augment import build_augment
from mmtrain.data.images.photo import random_crops, uniform
from mmtrain.data.images.shards import ImageShards
from mmtrain.errors import UserError

pytestmark = pytest.mark.usefixtures("ffcv")

KEYS = mix64(11, np.arange(4000))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 60))
def test_compiled_draws_are_those_of_the_clock(key: int, number: int) -> None:
    from mmtrain.data.ffcv.engine import draw, mixed

    keys = np.array([key], dtype=np.uint64)
    assert draw(keys[0], number) == uniform(keys, number)[0]
    first = np.uint64(mixed(np.uint64(0), keys[0]))  # numba hands out plain integers
    assert int(mixed(first, np.uint64(number))) == int(mix64(keys, number)[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 4000), st.integers(1, 4000))
def test_a_crop_lies_in_the_image_and_is_that_of_the_shards(key: int, height: int, width: int) -> None:
    from mmtrain.data.ffcv.engine import crop_box

    top, left, high, wide = crop_box(np.uint64(key), height, width)
    assert random_crops(np.array([key], dtype=np.uint64), [(width, height)]) == [(left, top, wide, high)]
    assert 0 <= top <= top + high <= height
    assert 0 <= left <= left + wide <= width
    assert min(high, wide) >= 1


def boxes(height: int, width: int) -> np.ndarray:
    from mmtrain.data.ffcv.engine import crop_box

    return np.array([crop_box(key, height, width) for key in KEYS], dtype=np.float64)


def torchvision_boxes(height: int, width: int) -> np.ndarray:
    from mmtrain.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from torchvision.transforms import RandomResizedCrop

    blank = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(len(KEYS))]
    return np.array(made, dtype=np.float64)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the greatest difference of the two distribution functions."""
    both = np.sort(np.concatenate([one, other]))
    below = [np.searchsorted(np.sort(values), both, side="right") / len(values) for values in (one, other)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize(("height", "width"), [(375, 500), (224, 224), (90, 700), (31, 17)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    ours, theirs = boxes(height, width), torchvision_boxes(height, width)

    def figures(found: np.ndarray) -> dict[str, np.ndarray]:
        top, left, high, wide = found.T
        return {
            "area": high * wide / (height * width),
            "aspect": np.log(wide / high),
            "row": (top + high / 2) / height,
            "column": (left + wide / 2) / width,
        }

    for name, mine in figures(ours).items():
        other = figures(theirs)[name]
        assert abs(mine.mean() - other.mean()) < 0.02, name
        # two samples of 4,000 of one distribution are further apart in 1 of 1,000 cases
        assert distance(mine, other) < 1.95 * math.sqrt(2 / len(KEYS)), name


@pytest.fixture(scope="module")
def halves(ffcv: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One image: black on the left, white on the right."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), SIZE // 2, 1).repeat(SIZE, 0)).save(buffer, "PNG")
    return make(tmp_path_factory.mktemp("halves"), {"train": [buffer.getvalue()]}, write_mode="raw")


@pytest.mark.parametrize(("hflip", "low", "high"), [(0.0, 0.0, 0.0), (0.5, 0.45, 0.55), (1.0, 1.0, 1.0)])
def test_flips_happen_as_often_as_asked(halves: Made, hflip: float, low: float, high: float) -> None:
    source = halves.source(augment="crop", hflip=hflip)
    images = source.fetch(np.zeros(1500, dtype=np.int64), KEYS[:1500])["image"]
    left, right = images[..., 0].mean((1, 2)), images[..., -1].mean((1, 2))
    seen = left != right  # crops on one side tell nothing
    assert int(seen.sum()) > 600
    assert low <= float((left > right)[seen].double().mean()) <= high


def drawn(source: Any, count: int) -> torch.Tensor:
    index = np.arange(count) % len(source)
    return source.fetch(index, KEYS[:count])["image"]


def same_brightness(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Means of images are distributed alike, and their mean and that of their spreads are within 4 standard errors."""
    assert ours.shape == theirs.shape
    count = len(ours)
    for figure in (torch.Tensor.mean, torch.Tensor.std):
        one, other = (torch.stack([figure(image) for image in images]) for images in (ours, theirs))
        error = math.sqrt(float(one.var() + other.var()) / count)
        assert error < 0.06  # in the normalised unit, where single images are about 1 apart
        assert abs(float(one.mean() - other.mean())) < 4 * error
        assert distance(one.numpy(), other.numpy()) < 1.95 * math.sqrt(2 / count)


@pytest.mark.parametrize("options", [{}, {"auto_augment": "", "re_prob": 0.0}, {"auto_augment": "", "re_prob": 1.0}])
def test_brightness_is_that_of_the_shards_transform(photos: Made, options: dict[str, Any]) -> None:
    count = 880
    shards = ImageShards(photos.shards / "train", train=True, augment="imagenet", **LOOK, **options)
    same_brightness(drawn(photos.source(augment="imagenet", **options), count), drawn(shards, count))


def test_brightness_of_crops_is_that_of_torchvisions(photos: Made) -> None:
    from mmtrain.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomResizedCrop, ToTensor

    count = 880
    filter_ = InterpolationMode.BICUBIC
    steps = Compose([RandomResizedCrop(SIZE, interpolation=filter_), ToTensor(), Normalize(LOOK["mean"], LOOK["std"])])
    shards = ImageShards(photos.shards / "train", train=False, **LOOK)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([steps(shards._photo(number % len(shards)).whole()) for number in range(count)])
    same_brightness(drawn(photos.source(augment="crop"), count), theirs)


def test_evaluation_is_timms_but_for_the_filter(photos: Made) -> None:
    ours = photos.source("val", train=False).fetch(np.arange(7), None)["image"]
    theirs = ImageShards(photos.shards / "val", train=False, **LOOK).fetch(np.arange(7), None)["image"]
    levels = (ours - theirs).abs() * torch.tensor(LOOK["std"]).view(3, 1, 1) * 255
    assert float(levels.mean()) < 3
    shifted = (ours[..., 1:] - theirs[..., :-1]).abs().mean()  # one pixel aside is far worse: the geometry is right
    assert float((ours - theirs).abs().mean()) < 0.25 * float(shifted)


def test_an_image_of_the_wanted_size_is_not_touched(pixels: Made) -> None:
    ours = pixels.source("val", train=False).fetch(np.arange(7), None)["image"]
    theirs = ImageShards(pixels.shards / "val", train=False, **LOOK).fetch(np.arange(7), None)["image"]
    assert torch.equal(ours, theirs)


def test_an_image_is_a_function_of_its_key_alone(photos: Made) -> None:
    for augment in ("light", "crop", "imagenet"):
        source = photos.source(augment=augment)
        whole = source.fetch(np.arange(8), KEYS[:8])["image"]
        alone = source.fetch(np.array([5]), KEYS[5:6])["image"]
        assert torch.equal(whole[5:6], alone), augment
        assert not torch.equal(whole[5:6], source.fetch(np.array([5]), KEYS[6:7])["image"]), augment


def test_photos_of_any_shape_are_read(ffcv: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    sizes = [(1, 1), (300, 2), (3, 200), (SIZE, SIZE), (64, 16)]
    made = make(tmp_path_factory.mktemp("shapes"), {"train": [picture(n, s, "PNG") for n, s in enumerate(sizes)]})
    for augment in ("none", "crop"):
        image = made.source(augment=augment).fetch(np.arange(5), KEYS[:5])["image"]
        assert image.shape == (5, 3, SIZE, SIZE)
        assert bool(torch.isfinite(image).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augment": "imagnet"}, "did you mean 'imagenet'"),
        ({"image_size": 0}, "data.image_size=0"),
        ({"crop_pct": 1.5}, "data.crop_pct=1.5"),
        ({"mean": [0.5]}, "data.mean=\\[0.5\\], data.std=.* must have 3 value"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_augment(True, **{**LOOK, **options})
