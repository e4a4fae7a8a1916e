"""Reading and checking the structure of a ``.beton`` file, and checking that FFCV is installed.

A beton consists of a header, a table of fields, a row for each sample, pages of data, and an allocation table at the
end. ``meta.json`` in the same folder (written by ``mmtrain data prepare ffcv``) lists the classes and, for each split,
the number of samples and the sizes of the blocks. The blocks are the shards from which the file was created, so that
both have the same order of samples.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmtrain.errors import UserError, nearest, os_errors

INSTALL = (
    "Install it with: apt-get install -y libopencv-dev libturbojpeg0-dev pkg-config && pip install 'mmtrain[ffcv]' "
    "(or read the images from tar shards with data.kind=shards)"
)
_PACKAGES = ("ffcv", "numba", "cv2")
VERSION = 2
#: ``mode`` of an image stored as JPEG. All others are stored as pixels.
JPG = 0
#: Block size for a file whose meta.json lists no blocks (a file that mmtrain did not write).
RUN = 1000
_HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
_FIELD = np.dtype([("type", "u1"), ("name", "u1", (16,)), ("arguments", "u1", (1024,))], align=True)
_PLACE = np.dtype([("sample", "<u8"), ("at", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")])
_BYTES = np.dtype([("at", "<u8"), ("size", "<u8")])
#: Row types of FFCV's field types: float, int, image, bytes, array, JSON, tensor.
_ROWS = {0: "<f8", 1: "<i8", 2: _IMAGE, 3: _BYTES, 4: "<u8", 5: _BYTES, 6: "<u8"}
_KINDS = {"image": 2, "label": 1}
_CURE = "Copy it again, or create it again with `mmtrain data prepare ffcv --force`"


@dataclass(frozen=True)
class Beton:
    """The structure of a beton with n samples."""

    path: Path
    labels: NDArray[np.int64]  # (n,)
    rows: tuple[NDArray[Any], ...]  # mode (uint8), height, width, position and size in bytes (int64), each (n,)
    page_size: int  # in bytes
    stored: int  # bytes of all images
    file_size: int  # in bytes
    block_sizes: list[int]  # samples in each block
    classes: list[str] | None  # names of the classes; None without meta.json

    def __len__(self) -> int:
        return len(self.labels)


def find_beton(path: str | Path) -> Path:
    """Return the path of a beton. Raises UserError if there is no such file; the message lists similar files."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    siblings = sorted(entry.name for entry in file.parent.glob("*.beton"))
    hint = nearest(file.name, siblings) or (f" (the folder contains {', '.join(siblings[:5])})." if siblings else ".")
    raise UserError(
        f"{file}: no such file (looked for {file.absolute()}){hint} Create it with `mmtrain data prepare ffcv "
        f"--root SHARDS --out {file.parent}`"
    )


def read_beton(path: str | Path) -> Beton:
    """Read and check the structure of a beton, but not its images.

    Raises:
        UserError: if the file is missing or damaged, has other fields, or does not match the meta.json in its folder.
    """
    file = find_beton(path)
    with os_errors(f"{file}: cannot be read"):
        size = file.stat().st_size
        with open(file, "rb") as stream:
            header = _read(stream, file, _HEADER, 1)[0]
            if header["version"] != VERSION or not header["fields"]:
                raise UserError(f"{file}: not a .beton of FFCV (version {header['version']}, not {VERSION}). {_CURE}")
            fields = _read(stream, file, _FIELD, int(header["fields"]))
            names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"]]
            kinds = dict(zip(names, fields["type"].tolist(), strict=True))
            wrong = [name for name, kind in _KINDS.items() if kinds.get(name) != kind]
            if wrong or any(kind not in _ROWS for kind in kinds.values()):
                raise UserError(
                    f"{file}: the fields are {', '.join(kinds)}, but must be an RGBImageField image and an IntField "
                    "label. Create the file with `mmtrain data prepare ffcv`"
                )
            row = np.dtype([("", _ROWS[kind]) for kind in kinds.values()], align=True)
            rows = _read(stream, file, row, int(header["samples"]))
            table, page = int(header["table"]), int(header["page_size"])
            if not page or page & (page - 1):
                raise UserError(f"{file}: not a .beton: the page size {page} is not a power of two. {_CURE}")
            if not table or table > size or (size - table) % _PLACE.itemsize:
                raise UserError(f"{file}: the file is truncated or was not written completely ({size} bytes). {_CURE}")
            stream.seek(table)
            places = _read(stream, file, _PLACE, (size - table) // _PLACE.itemsize)
    image, label = (rows[f"f{names.index(name)}"] for name in _KINDS)
    places = np.sort(places, order="at")
    at = np.minimum(np.searchsorted(places["at"], image["at"]), max(0, len(places) - 1))
    ends = places["at"] + places["size"]
    if not len(rows):
        raise UserError(f"{file}: the file contains no samples. {_CURE}")
    empty = int(min(image["height"].min(), image["width"].min())) < 1
    beyond = (places["at"] > table) | (places["size"] > table) | (ends > table)  # the sum alone may overflow
    if empty or not len(places) or (places["at"][at] != image["at"]).any() or beyond.any():
        raise UserError(f"{file}: the table of images is damaged or truncated. {_CURE}")
    labels = label.astype(np.int64)
    meta = _meta(file.parent / "meta.json")
    return Beton(
        path=file,
        labels=labels,
        rows=(
            np.ascontiguousarray(image["mode"]),
            *(np.ascontiguousarray(image[name], dtype=np.int64) for name in ("height", "width", "at")),
            places["size"][at].astype(np.int64),
        ),
        page_size=page,
        stored=int(places["size"][at].sum()),
        file_size=size,
        block_sizes=_blocks(file, meta, len(rows)),
        classes=_classes(file, meta, labels),
    )


def _read(stream: Any, file: Path, kind: np.dtype, count: int) -> NDArray[Any]:
    size = count * kind.itemsize
    content = stream.read(size) if size <= file.stat().st_size else b""  # no huge allocation for a damaged count
    if len(content) != size:
        raise UserError(f"{file}: the file is truncated or not a .beton. {_CURE}")
    return np.frombuffer(content, dtype=kind)


def _meta(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        meta["counts"] = {str(split): int(count) for split, count in meta.get("counts", {}).items()}
        meta["blocks"] = {str(split): [int(n) for n in sizes] for split, sizes in meta.get("blocks", {}).items()}
        if meta.get("classes") is not None:
            meta["classes"] = [str(name) for name in meta["classes"]]
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{file}: cannot be read as the meta.json of a prepared data set ({error}). Prepare the data set again"
        ) from error
    return meta


def _blocks(file: Path, meta: dict[str, Any], samples: int) -> list[int]:
    count = meta.get("counts", {}).get(file.stem, samples)
    blocks = meta.get("blocks", {}).get(file.stem)
    if blocks is None:
        blocks = [RUN] * (samples // RUN) + ([samples % RUN] if samples % RUN else [])
    if count != samples or sum(blocks) != samples or min(blocks) < 0:
        raise UserError(
            f"{file}: {samples} samples, but the meta.json in its folder lists {count} samples and blocks of "
            f"{sum(blocks)} samples in total. The files do not match: create both again with `mmtrain data prepare "
            "ffcv --force`"
        )
    return list(blocks)


def _classes(file: Path, meta: dict[str, Any], labels: NDArray[np.int64]) -> list[str] | None:
    classes = meta.get("classes")
    if int(labels.min()) < 0 or (classes is not None and int(labels.max()) >= len(classes)):
        bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise UserError(
            f"{file}: label {bad}, but labels must be class numbers 0, 1, ..., and the meta.json in its folder lists "
            f"{'no' if classes is None else len(classes)} classes. Create both again with `mmtrain data prepare ffcv "
            "--force`"
        )
    return classes


def require_ffcv() -> None:
    """Import ffcv, or raise UserError with the commands that install it."""
    lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"data.kind=ffcv: {' and '.join(lacking)} cannot be found. {INSTALL}")
    try:
        with torch_threads_kept():
            import ffcv.memory_managers  # noqa: F401
    except (ImportError, OSError) as error:  # OpenCV or libturbojpeg, which ffcv links to, may be missing
        raise UserError(f"data.kind=ffcv: ffcv cannot be imported ({error}). {INSTALL}") from error


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore torch's number of threads at the end of the block. FFCV changes it when it is imported or loads data."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
