"""Small real shards, and sources that show what the loaders do."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from beton_cases import SIZE, Made, make, picture
from PIL import Image

Members = list[tuple[str, bytes]]


def png(seed: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def image_bytes() -> Callable[..., bytes]:
    return png


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., Path]:
    """make_tar(members, name) writes a plain tar of (member name, bytes) below tmp_path."""

    def make(members: Members, name: str = "train/shard-000000.tar") -> Path:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w") as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return target

    return make


@pytest.fixture
def samples() -> Callable[..., Members]:
    """samples(count, first): images with class numbers, keys 000000, 000001, ..."""

    def make(count: int, first: int = 0, classes: int = 3) -> Members:
        members: Members = []
        for number in range(first, first + count):
            members += [(f"{number:06d}.cls", str(number % classes).encode()), (f"{number:06d}.png", png(number))]
        return members

    return make


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as shards: 1,259 / 179 / 359 real scans, 32 × 32."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'mmtrain[demo]'")
    from mmtrain.data.prepare.demo import prepare_digits

    return prepare_digits(tmp_path_factory.mktemp("digits") / "set").out


@pytest.fixture(scope="session")
def ffcv() -> None:
    """Skips where FFCV is not installed, and says how to install it."""
    from mmtrain.data.ffcv.format import require_ffcv
    from mmtrain.errors import UserError

    try:
        require_ffcv()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def photos(ffcv: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """22 JPEG files of different sizes in blocks of 6, 6, 5 and 5; and 7 to evaluate."""
    sizes = [(40 + 3 * n % 17, 30 + 5 * n % 23) for n in range(29)]
    files = [picture(n, size) for n, size in enumerate(sizes)]
    return make(tmp_path_factory.mktemp("photos"), {"train": files[:22], "val": files[22:]})


@pytest.fixture(scope="session")
def pixels(ffcv: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """22 PNG files of the size that is trained on, stored raw."""
    files = [picture(n, (SIZE, SIZE), "PNG") for n in range(29)]
    folder = tmp_path_factory.mktemp("pixels")
    return make(folder, {"train": files[:22], "val": files[22:]}, write_mode="raw")
