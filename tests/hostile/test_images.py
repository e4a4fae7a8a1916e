"""Images that are none, that other programs would run, or that claim more than can be meant: refused at every door."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from mmtrain.data.images import formats
from mmtrain.data.images.formats import open_image
from mmtrain.data.images.photo import Box, Photo, decode
from mmtrain.data.images.shards import ImageShards
from mmtrain.data.images.targets import read_mask
from mmtrain.data.prepare.images import prepare_images
from mmtrain.data.prepare.targets import prepare_segmentation
from mmtrain.errors import UserError


def png(width: int, height: int) -> bytes:
    """A whole PNG file whose header claims that size, and which holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n%%EOF\n"
CASES = {
    "PostScript": (POSTSCRIPT, "not an image, or damaged; supported formats: JPEG, PNG"),
    "PostScript behind a DOS header": (b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 60) + POSTSCRIPT, "not an image"),
    "an icon": (b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + bytes(80), "not an image"),
    "a film": (b"\0\0\1\xb3" + bytes(80), "not an image"),
    "nothing": (b"", "not an image"),
    "10 gigapixels": (png(100_000, 100_000), r"more pixels than the limit of 178,956,970"),
    "one row too many": (png(178_956_971, 1), r"more pixels than the limit of 178,956,970"),
    "179 megapixels that are not there": (png(13_000, 13_000), "truncated|broken|incomplete"),
}


@pytest.fixture(autouse=True)
def no_ghostscript(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()  # every plugin of Pillow is loaded, as any other package may have done
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))


def _shards(path: Path, content: bytes) -> ImageShards:
    path.mkdir()
    with tarfile.open(path / "a.tar", "w") as tar:
        for name, part in (("a.jpg", content), ("a.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(part)
            tar.addfile(info, io.BytesIO(part))
    return ImageShards(path, image_size=8, train=True, augment="crop", mean=[0.5] * 3, std=[0.5] * 3)


def _train(folder: Path, content: bytes) -> None:
    _shards(folder / "shards", content).fetch(np.array([0]), np.array([1], dtype=np.uint64))


def _prepare(folder: Path, content: bytes) -> None:
    (folder / "in/a").mkdir(parents=True)
    (folder / "in/a/1.jpg").write_bytes(content)
    prepare_images(folder / "in", folder / "out", workers=1, val_fraction=0, test_fraction=0)


def _masks(folder: Path, content: bytes) -> None:
    for name in ("images/train", "annotations/train"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images/train/1.jpg")
    (folder / "annotations/train/1.png").write_bytes(content)
    prepare_segmentation(folder, folder / "out", workers=1)


pytestmark = pytest.mark.filterwarnings("ignore:Image size")
DOORS: dict[str, Callable[[Path, bytes], object]] = {
    "decode": lambda _, content: decode(content),
    "Photo": lambda _, content: Photo(content).whole(),
    "training": _train,
    "prepare images": _prepare,
    "prepare segmentation": _masks,
    "a mask of a shard": lambda _, content: read_mask({"jpg": content, "seg.png": content}),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_no_image_is_refused(tmp_path: Path, case: str, door: str) -> None:
    content, said = CASES[case]
    with pytest.raises(ValueError, match=said) as caught:
        DOORS[door](tmp_path, content)
    assert isinstance(caught.value, UserError) or door in ("decode", "Photo")
    assert "object at 0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_what_is_read(kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    try:
        Image.new("RGB", (16, 16), (200, 10, 60)).save(buffer, kind)
    except (KeyError, OSError):
        pytest.skip(f"Pillow is built without {kind} here")
    assert decode(buffer.getvalue()).size == (16, 16)
    (tmp_path / "a.dat").write_bytes(buffer.getvalue())
    with open_image(tmp_path / "a.dat") as image:
        assert image.format == kind


def test_a_large_photo_is_opened_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    formats._readable.cache_clear()  # which sets the filter; pytest has taken it back since
    formats._readable()
    assert open_image(png(10_000, 10_000)).size == (10_000, 10_000)
    assert not recwarn.list


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))
def test_changed_images_are_decoded_or_refused(data: st.DataObject, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content) - 1, 300)))
        content[place : place + 1] = data.draw(st.sampled_from((b"", b"\0", b"\x02", b"\xff", b"\xff\xff\xff\xff")))
    with suppress(ValueError):
        photo = Photo(bytes(content))
        photo.part(Box(0, 0, *photo.size), 8)
        photo.whole()
