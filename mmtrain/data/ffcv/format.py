"""What a .beton holds: its samples, labels and sizes, and whether it is whole. Also, whether FFCV is installed.

A beton is a header, a table of fields, a row for each sample, pages of data, and at the end a table of what lies where.
``meta.json`` beside it (written by ``mmtrain data prepare ffcv``) has the classes, the number of samples of each split,
and its blocks: the shards it was made of, which keep the numbering and the order of the data clock the same as theirs.
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
    "install it with: apt-get install -y libopencv-dev libturbojpeg0-dev pkg-config && pip install 'mmtrain[ffcv]' "
    "(or read the same images as tar shards: data.kind=shards)"
)
_PACKAGES = ("ffcv", "numba", "cv2")
VERSION = 2
#: ``mode`` of an image stored as JPEG; the others are stored as they are.
JPG = 0
#: Block of a file without blocks in its meta.json (one that mmtrain has not written).
RUN = 1000
_HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
_FIELD = np.dtype([("type", "u1"), ("name", "u1", (16,)), ("arguments", "u1", (1024,))], align=True)
_PLACE = np.dtype([("sample", "<u8"), ("at", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")])
_BYTES = np.dtype([("at", "<u8"), ("size", "<u8")])
#: Rows of ffcv's own kinds of fields: float, int, image, bytes, array, JSON, tensor.
_ROWS = {0: "<f8", 1: "<i8", 2: _IMAGE, 3: _BYTES, 4: "<u8", 5: _BYTES, 6: "<u8"}
_KINDS = {"image": 2, "label": 1}
_CURE = "copy it again, or make it again with mmtrain data prepare ffcv --force"


@dataclass(frozen=True)
class Beton:
    """``rows``: of each sample its mode (uint8), height, width, place in the file and size in bytes (int64), all (n,).
    ``page_size``, ``stored`` (all images) and ``file_size``: bytes. ``block_sizes``: as a source has them. ``classes``:
    None without meta.json.
    """

    path: Path
    labels: NDArray[np.int64]  # (n,)
    rows: tuple[NDArray[Any], ...]
    page_size: int
    stored: int
    file_size: int
    block_sizes: list[int]
    classes: list[str] | None

    def __len__(self) -> int:
        return len(self.labels)


def find_beton(path: str | Path) -> Path:
    """The file, or UserError with what is there instead."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    there = sorted(entry.name for entry in file.parent.glob("*.beton"))
    hint = nearest(file.name, there) or (f" (there is {', '.join(there[:5])})" if there else "")
    raise UserError(
        f"{file}: no such file (looked for {file.absolute()}){hint}; make it with: mmtrain data prepare ffcv "
        f"--root SHARDS --out {file.parent}"
    )


def read_beton(path: str | Path) -> Beton:
    """Check the structure of a file, though not its images.

    Raises UserError for one that is damaged or of other fields, or that does not belong to the meta.json beside it.
    """
    file = find_beton(path)
    with os_errors(f"{file}: cannot be read"):
        size = file.stat().st_size
        with open(file, "rb") as stream:
            header = _read(stream, file, _HEADER, 1)[0]
            if header["version"] != VERSION or not header["fields"]:
                raise UserError(f"{file}: not a .beton of FFCV (version {header['version']}, not {VERSION}); {_CURE}")
            fields = _read(stream, file, _FIELD, int(header["fields"]))
            names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"]]
            kinds = dict(zip(names, fields["type"].tolist(), strict=True))
            wrong = [name for name, kind in _KINDS.items() if kinds.get(name) != kind]
            if wrong or any(kind not in _ROWS for kind in kinds.values()):
                raise UserError(
                    f"{file}: its fields are {', '.join(kinds)}; wanted is an RGBImageField image and an IntField "
                    "label: write it with mmtrain data prepare ffcv"
                )
            row = np.dtype([("", _ROWS[kind]) for kind in kinds.values()], align=True)
            rows = _read(stream, file, row, int(header["samples"]))
            table, page = int(header["table"]), int(header["page_size"])
            if not page or page & (page - 1):
                raise UserError(f"{file}: pages of {page} bytes, which is no power of two: not a .beton; {_CURE}")
            if not table or table > size or (size - table) % _PLACE.itemsize:
                raise UserError(f"{file}: the file is truncated or was never finished ({size} bytes); {_CURE}")
            stream.seek(table)
            places = _read(stream, file, _PLACE, (size - table) // _PLACE.itemsize)
    image, label = (rows[f"f{names.index(name)}"] for name in _KINDS)
    places = np.sort(places, order="at")
    at = np.minimum(np.searchsorted(places["at"], image["at"]), max(0, len(places) - 1))
    ends = places["at"] + places["size"]
    if not len(rows):
        raise UserError(f"{file}: the file holds no samples; {_CURE}")
    empty = int(min(image["height"].min(), image["width"].min())) < 1
    beyond = (places["at"] > table) | (places["size"] > table) | (ends > table)  # a sum alone may wrap around
    if empty or not len(places) or (places["at"][at] != image["at"]).any() or beyond.any():
        raise UserError(f"{file}: the table of images is damaged or truncated; {_CURE}")
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
    content = stream.read(size) if size <= file.stat().st_size else b""  # a damaged count: do not ask for the memory
    if len(content) != size:
        raise UserError(f"{file}: the file is truncated or not a .beton; {_CURE}")
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
            f"{file}: not readable as the meta.json of a prepared dataset ({error}); prepare it again"
        ) from error
    return meta


def _blocks(file: Path, meta: dict[str, Any], samples: int) -> list[int]:
    count = meta.get("counts", {}).get(file.stem, samples)
    blocks = meta.get("blocks", {}).get(file.stem)
    if blocks is None:
        blocks = [RUN] * (samples // RUN) + ([samples % RUN] if samples % RUN else [])
    if count != samples or sum(blocks) != samples or min(blocks) < 0:
        raise UserError(
            f"{file}: {samples} samples, but meta.json beside it tells of {count} in blocks of {sum(blocks)} together: "
            "the two do not belong together; make both again with mmtrain data prepare ffcv --force"
        )
    return list(blocks)


def _classes(file: Path, meta: dict[str, Any], labels: NDArray[np.int64]) -> list[str] | None:
    classes = meta.get("classes")
    if int(labels.min()) < 0 or (classes is not None and int(labels.max()) >= len(classes)):
        bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise UserError(
            f"{file}: label {bad}, but labels are class numbers 0, 1, ... and meta.json beside it lists "
            f"{'no' if classes is None else len(classes)} classes: make both again with mmtrain data prepare ffcv "
            "--force"
        )
    return classes


def require_ffcv() -> None:
    """Import ffcv, or raise UserError with the commands that install it."""
    lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"data.kind=ffcv: {' and '.join(lacking)} cannot be found; {INSTALL}")
    try:
        with torch_threads_kept():
            import ffcv.memory_managers  # noqa: F401
    except (ImportError, OSError) as error:  # its library is compiled: OpenCV or libturbojpeg may be gone
        raise UserError(f"data.kind=ffcv: ffcv does not load ({error}); {INSTALL}") from error


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """ffcv sets torch's number of threads when it is imported and when a loader is made: put it back."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
