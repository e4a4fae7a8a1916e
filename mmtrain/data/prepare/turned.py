"""Targets of photos that their camera marked as turned (EXIF): found out, or asked for, and turned with the photo.

Photos are turned upright when they are decoded. Their masks and boxes may have been made on the photo as it is shown,
or on the pixels as they are stored, which programs that do not know EXIF show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.prepare.encode import BadSample
from mmtrain.errors import UserError

CHOICES = ("upright", "stored")
Size = tuple[int, int]  # (W, H)


def check_choice(turned: str | None) -> None:
    """Raise UserError for a ``--turned`` that is none of the choices."""
    if turned is not None and turned not in CHOICES:
        raise UserError(f"--turned {turned}: {' or '.join(CHOICES)}")


def turn_wanted(path: str, turn: int, size: Size, found: Size, choice: str | None) -> int:
    """The EXIF orientation by which the targets of ``path`` are still to be turned; 1: they fit as they are.

    ``turn``: of the photo; ``size``: of the photo when upright; ``found``: of its targets. Raises BadSample where
    neither the sizes nor ``choice`` tell, and where the sizes do not fit.
    """
    stored = size[::-1] if turn >= 5 else size
    here = f"the photo is marked as turned (EXIF orientation {turn}), and " if turn != 1 else ""
    if found not in {"upright": (size,), "stored": (stored,)}.get(choice or "", (size, stored)):
        raise BadSample(
            path, f"{here}its targets are for {found[0]} × {found[1]} pixels, the image has {size[0]} × {size[1]}"
        )
    if turn == 1 or choice == "upright":
        return 1
    if choice is None and size == stored:
        raise BadSample(
            path,
            f"{here}its size does not tell whether its targets were made on the photo as it is shown (give --turned "
            "upright) or on the pixels as they are stored (--turned stored)",
        )
    return turn if choice == "stored" or found == stored else 1


def turn_array(stored: NDArray[Any], turn: int) -> NDArray[Any]:
    """(H, W) as it is stored → upright."""
    turned = {
        1: lambda: stored,
        2: lambda: stored[:, ::-1],
        3: lambda: stored[::-1, ::-1],
        4: lambda: stored[::-1],
        5: lambda: stored.T,
        6: lambda: np.rot90(stored, -1),
        7: lambda: np.rot90(stored, 2).T,
        8: lambda: np.rot90(stored),
    }[turn]()
    return np.ascontiguousarray(turned)


def turn_points(points: NDArray[np.float64], turn: int, size: Size) -> NDArray[np.float64]:
    """(n, 2) places x, y in the stored image of ``size`` → the same places in the upright one."""
    x, y, (width, height) = points[:, 0], points[:, 1], size
    turned = {
        1: (x, y),
        2: (width - x, y),
        3: (width - x, height - y),
        4: (x, height - y),
        5: (y, x),
        6: (height - y, x),
        7: (height - y, width - x),
        8: (y, width - x),
    }[turn]
    return np.stack(turned, axis=1)


def turn_annotations(path: str, target: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """The annotations of a stored image → those of the upright one. Raises BadSample for compressed RLE."""
    size = (target["width"], target["height"])

    def turned(numbers: list[float]) -> NDArray[np.float64]:
        return turn_points(np.array(numbers, dtype=np.float64).reshape(-1, 2), turn, size)

    def outline(found: Any) -> Any:
        if isinstance(found, list):
            return [turned(polygon).reshape(-1).tolist() for polygon in found]
        if not isinstance(found["counts"], list):
            raise BadSample(path, "its compressed outline (RLE) cannot be turned with the photo: store both upright")
        return _turned_runs(path, found["counts"], turn, size)

    corners = [turned(box) for box in target["boxes"]]
    upright = size[::-1] if turn >= 5 else size
    return {
        **target,
        "width": upright[0],
        "height": upright[1],
        "boxes": [[*corner.min(axis=0).tolist(), *corner.max(axis=0).tolist()] for corner in corners],
        "segmentations": [outline(found) for found in target["segmentations"]],
    }


def _turned_runs(path: str, counts: list[int], turn: int, size: Size) -> dict[str, Any]:
    """COCO's run lengths: columns, one after the other, beginning with the length of what is outside."""
    width, height = size
    runs = np.array(counts, dtype=np.int64)
    if runs.min(initial=0) < 0 or int(runs.sum()) != width * height:
        raise BadSample(path, f"an outline's run lengths do not add up to {width} × {height} pixels")
    inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
    flat = turn_array(inside, turn).T.reshape(-1)
    borders = np.flatnonzero(np.diff(flat, prepend=0)) if len(flat) else np.empty(0, np.int64)
    lengths = np.diff(np.concatenate([[0], borders, [len(flat)]]))
    return {"size": [width, height] if turn >= 5 else [height, width], "counts": lengths.tolist()}
