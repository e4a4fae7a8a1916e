"""Images decoded in part, random crops, erasing, normalising: the usual results and distributions."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmtrain.data.core import buffers
from mmtrain.data.core.order import mix64
from mmtrain.data.images.photo import Box, Photo, decode, erase, flips, random_crops, resized
from mmtrain.data.images.transforms import Normalise, build_transform
from mmtrain.torchvision_compat import ensure_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, as photos have."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_whole_jpeg_is_what_pillow_makes_of_it(subsampling: int, channels: int) -> None:
    content = encoded(picture(61, 47), subsampling=subsampling)
    ours = np.asarray(Photo(content, channels).whole()).astype(int)
    theirs = np.asarray(decode(content, channels)).astype(int)
    assert ours.shape == theirs.shape
    # both are libjpeg-turbo; grey is the luminance of the file here, and rounded from RGB there
    assert np.abs(ours - theirs).max() <= (0 if channels == 3 else 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_part_is_no_larger_than_it_has_to_be(kind: str) -> None:
    image = picture(800, 640)
    photo, box = Photo(encoded(image, kind)), Box(80, 40, 560, 480)
    part = photo.part(box, 100)
    assert min(part.shape[:2]) >= 100
    if kind == "JPEG":
        assert part.shape[:2] == (120, 140)  # a quarter
    ours = resized(part, 100).astype(int)
    theirs = np.asarray(image.crop((80, 40, 640, 520)).resize((100, 100), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).mean() < 3  # levels of 255: JPEG, and a crop at a quarter of the size


def test_a_small_crop_of_a_large_photo_is_decoded_whole_only_where_it_must_be() -> None:
    """16 megapixels: at an eighth, at most a half of the time of the whole."""
    content = encoded(picture(4900, 3300))

    def seconds(box: Box) -> float:
        began = time.process_time()
        Photo(content).part(box, 224)
        return time.process_time() - began

    whole = min(seconds(Box(0, 0, 230, 230)) for _ in range(2))
    eighth = min(seconds(Box(0, 0, 4800, 3200)) for _ in range(2))
    assert eighth < whole / 2


def test_sixty_megapixels_and_more_than_can_be_meant() -> None:
    content = encoded(Image.new("RGB", (10000, 6000), (10, 200, 30)))
    assert Photo(content).size == (10000, 6000)
    assert np.abs(Photo(content).part(Box(0, 0, 10000, 6000), 224).mean((0, 1)) - (10, 200, 30)).max() < 3
    header = encoded(Image.new("L", (8, 8)))
    at = header.index(b"\xff\xc0") + 5
    bomb = header[:at] + (40000).to_bytes(2, "big") * 2 + header[at + 4 :]
    with pytest.raises(ValueError, match=r"more pixels than|exceeds limit"):
        Photo(bomb).whole()


@pytest.mark.parametrize("turn", range(2, 9))
def test_a_photo_that_was_turned_is_turned_upright(turn: int) -> None:
    image = picture(40, 24)
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encoded(image, exif=exif, subsampling=0, quality=100)
    photo = Photo(content)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert photo.size == expected.size
    assert np.array_equal(np.asarray(photo.whole()), np.asarray(expected))


def test_stray_bytes_do_no_harm_but_a_missing_end_does() -> None:
    content = encoded(picture(64, 48))
    at = content.index(b"\xff\xda")
    assert Photo(content[:at] + b"\x00\x00\x00" + content[at:]).whole().size == (64, 48)
    photo = Photo(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated"):
        photo.whole()
    with pytest.raises(ValueError, match="truncated"):
        Photo(content[: len(content) // 2]).part(Box(0, 0, 20, 20), 8)


def test_crops_are_distributed_as_torchvisions() -> None:
    ensure_torchvision()
    from torchvision.transforms import RandomResizedCrop

    count, size = 20000, (500, 375)
    boxes = np.array(random_crops(mix64(1, np.arange(count)), [size] * count))
    torch.manual_seed(0)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(torch.empty(1, size[1], size[0]), (0.08, 1.0), (3 / 4, 4 / 3))
            for _ in range(count)
        ]
    )[:, [1, 0, 3, 2]]  # top, left, height, width → left, top, width, height
    for name, of in {
        "area": lambda b: b[:, 2] * b[:, 3] / (size[0] * size[1]),
        "log aspect": lambda b: np.log(b[:, 2] / b[:, 3]),
        "left": lambda b: b[:, 0] / size[0],
        "top": lambda b: b[:, 1] / size[1],
    }.items():
        ours, other = of(boxes), of(theirs)
        # means of 20,000 differ by more than 4.5 standard errors once in 150,000; deviations within 3 %
        assert abs(ours.mean() - other.mean()) < 4.5 * np.hypot(ours.std(), other.std()) / count**0.5, name
        assert ours.std() == pytest.approx(other.std(), rel=0.03), name
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**63))
def test_a_crop_lies_within_the_image(width: int, height: int, key: int) -> None:
    (box,) = random_crops(np.array([key], dtype=np.uint64), [(width, height)])
    assert min(box.left, box.top) >= 0
    assert min(box.width, box.height) >= 1
    assert box.left + box.width <= width
    assert box.top + box.height <= height


def test_flips_and_erasing_happen_as_often_as_asked() -> None:
    keys = mix64(2, np.arange(4000))
    assert abs(flips(keys, 0.5).mean() - 0.5) < 0.04  # five standard errors
    pixels = np.full((4000, 32, 32, 3), 7, dtype=np.uint8)
    erase(pixels, keys, 0.25, MEAN, STD)
    share = (pixels != 7).any(-1).mean((1, 2))
    assert abs((share > 0).mean() - 0.25) < 0.035
    drawn = share[share > 0]
    assert 0.01 < drawn.min() < 0.05
    assert 0.28 < drawn.max() < 0.36
    assert abs(drawn.mean() - 0.16) < 0.03  # (2 + 33) / 2 %, less those that do not fit and are drawn again
    noise = pixels[(pixels != 7).any(-1)].astype(float) / 255
    assert np.abs(noise.mean(0) - MEAN).max() < 0.02


def test_normalising_is_the_formula_and_its_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (5, 9, 7, 3), dtype=torch.uint8)
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - torch.tensor(MEAN).view(-1, 1, 1).double()) / torch.tensor(
        STD
    ).view(-1, 1, 1).double()
    made = Normalise(MEAN, STD)(pixels)
    assert made.is_contiguous()
    assert (made.double() - expected).abs().max() < 2e-6  # float32 of values up to 2.7
    again = Normalise(MEAN, STD)(pixels)
    assert torch.equal(made, again)
    assert made.data_ptr() != again.data_ptr()  # while the first is in use
    del made, again
    monkeypatch.setattr(buffers, "_block", lambda size: pytest.fail("fresh memory"))
    assert torch.equal(Normalise(MEAN, STD)(pixels), Normalise(MEAN, STD)(pixels))


@pytest.mark.parametrize("augment", ["crop", "imagenet"])
def test_the_recipes_look_like_timms(augment: str) -> None:
    """The mean and deviation of brightness over many draws, beside timm's own transform of the same picture."""
    ensure_torchvision()
    from timm.data import create_transform

    image, count = picture(160, 120, seed=3), 600
    policy = "rand-m9-mstd0.5-inc1" if augment == "imagenet" else None
    ours = build_transform(True, 32, augment, mean=MEAN, std=STD)  # first: it mends timm's posterize
    theirs = create_transform(
        32,
        is_training=True,
        auto_augment=policy,
        interpolation="bicubic",
        re_prob=0.25 if augment == "imagenet" else 0.0,
        re_mode="pixel",
        color_jitter=None,
        mean=MEAN,
        std=STD,
    )
    torch.manual_seed(1)
    np.random.seed(1)
    other = torch.stack([theirs(image) for _ in range(count)])
    made = ours([Photo(encoded(image, "PNG"))] * count, mix64(4, np.arange(count)))
    for statistic in (lambda x: x.mean((2, 3)), lambda x: x.std((2, 3))):
        one, two = statistic(made).double(), statistic(other).double()
        error = ((one.var(0) + two.var(0)) / count).sqrt()
        # five standard errors, and 0.03 for noise that is cut off at black and white
        assert ((one.mean(0) - two.mean(0)).abs() < 5 * error + 0.03).all()


def test_evaluation_of_a_jpeg_is_timms_to_the_bit_before_normalising() -> None:
    ensure_torchvision()
    from timm.data import create_transform

    content = encoded(picture(150, 110))
    theirs = create_transform(64, is_training=False, interpolation="bicubic", crop_pct=0.875, mean=MEAN, std=STD)
    ours = build_transform(False, 64, mean=MEAN, std=STD)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    assert (ours([Photo(content)], None)[0] - theirs(image)).abs().max() < 2e-6
