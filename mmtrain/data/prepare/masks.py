"""Mask files → class numbers for each pixel, and whether these can be what was meant.

Photos that their camera marked as turned (EXIF) are turned upright when they are decoded. Their masks and boxes may
have been made on the photo as it is shown, or on the pixels as they are stored: which of the two is found out or asked
for, and targets are turned with the photo.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.core.order import mix64
from mmtrain.data.images.formats import open_image
from mmtrain.data.images.photo import orientation
from mmtrain.data.prepare.encode import BadSample, Encoded, Item, encode_image, read_file, shrunk, to_bytes
from mmtrain.errors import UserError

VOID = 255
#: Masks that are looked at before any is written, at least.
_LOOKED_AT = 64
#: Numbers without gaps: of the classes up to the largest, at least one in so many is seen.
_SPARSE, _FEW = 8, 16
#: Values that interpolation makes are many, and rare: three quarters of them hold less than this part of the pixels.
_MANY, _RARE = 30, 0.005


@dataclass(frozen=True)
class MaskValues:
    """What the values in mask files mean. ``values``: that of class 0, of class 1, ... (None: the class numbers)."""

    values: tuple[int, ...] | None = None
    ignore: tuple[int, ...] = (VOID,)
    zero_is_void: bool = False

    @property
    def voids(self) -> tuple[int, ...]:
        """The numbers that are no class, after reading."""
        if self.values is not None:
            return (VOID,)
        return tuple(sorted({*self.ignore, VOID} if self.zero_is_void else set(self.ignore)))

    def read(self, path: str) -> NDArray[np.uint8]:
        """The class numbers (H, W) of a mask file: grey, black and white, or the places in a palette.

        Raises BadSample.
        """
        stored, lossy = _stored(path)
        if self.values is not None:
            return self._mapped(path, stored, lossy)
        if lossy:
            raise BadSample(
                path,
                "the mask is a JPEG, whose compression changes class numbers: store masks as PNG, or give --mask-values"
                " with the values that were meant",
            )
        if not self.zero_is_void:
            return stored
        # 0 becomes 255, n becomes n - 1; a void that was 255 before stays one
        return np.where(stored == VOID, VOID, stored - np.uint8(1)).astype(np.uint8)

    def _mapped(self, path: str, stored: NDArray[np.uint8], lossy: bool) -> NDArray[np.uint8]:
        assert self.values is not None
        known = [*self.values, *(value for value in self.ignore if value not in self.values)]
        numbers = [*range(len(self.values)), *[VOID] * (len(known) - len(self.values))]
        if lossy:  # the nearest of them
            distance = np.abs(np.arange(VOID + 1)[:, None] - np.array(known)[None])
            return np.array(numbers, dtype=np.uint8)[distance.argmin(1)][stored]
        if unknown := sorted(set(np.unique(stored).tolist()) - set(known)):
            raise BadSample(path, f"holds the value {unknown[0]}, which --mask-values and --ignore do not name")
        table = np.zeros(VOID + 1, dtype=np.uint8)
        table[known] = numbers
        return table[stored]


def _stored(path: str) -> tuple[NDArray[np.uint8], bool]:
    """The values in a mask file, and whether its format changes values."""
    content = read_file(path)
    try:
        image = open_image(content)
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise almost anything for damaged files
        raise BadSample(path, f"the mask cannot be decoded ({type(error).__name__}: {error})") from error
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise BadSample(path, f"the mask's pixels are {image.mode}, not class numbers (grey, or a palette)")
    numbers = np.asarray(image)
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) <= VOID:
        raise BadSample(path, f"the mask holds class numbers outside of 0 to {VOID}")
    return numbers.astype(np.uint8), image.format in ("JPEG", "MPO")


@dataclass(frozen=True)
class MaskEncoder:
    """An image and its mask (``.seg.png``, grey with 8 bits: a class number for each pixel).

    ``classes``: how many there are (None: any number). ``turned``: see ``mmtrain.data.prepare.masks``.
    """

    image_size: int | None
    quality: int
    classes: int | None
    meaning: MaskValues
    turned: str | None = None
    labelled: ClassVar[bool] = False

    def __call__(self, item: Item) -> Encoded:
        from PIL import Image

        item = item._replace(content=item.content or read_file(item.path))
        suffix, content, size = encode_image(item, self.image_size, self.quality)
        numbers = self.meaning.read(item.target)
        found = numbers.shape[1], numbers.shape[0]
        turn = turn_wanted(item.target, orientation(item.content), size, found, self.turned)
        numbers = turn_array(numbers, turn)
        for value in np.unique(numbers).tolist() if self.classes is not None else ():
            if value >= self.classes and value not in self.meaning.voids:
                raise BadSample(
                    item.target, f"holds the class number {value}, but there are {self.classes} classes (see --ignore)"
                )
        mask = Image.fromarray(numbers)
        if self.image_size is not None:
            mask = mask.resize(shrunk(size, self.image_size), Image.Resampling.NEAREST)
        pixels = np.bincount(np.asarray(mask).reshape(-1), minlength=VOID + 1)
        counts = {str(value): int(pixels[value]) for value in np.flatnonzero(pixels)}
        return Encoded({suffix: content, "seg.png": to_bytes(mask, None)}, counts)


def parse_values(text: str | None, names: Sequence[str] | None) -> tuple[int, ...] | None:
    """The values of ``--mask-values``: "0,255". Raises UserError."""
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(set(values)) != len(values) or not values or not all(0 <= value <= VOID for value in values):
        raise UserError(f"--mask-values {text}: different numbers from 0 to {VOID}, such as 0,255: of class 0, 1, ...")
    if names is not None and len(names) != len(values):
        raise UserError(f"--mask-values {text}: {len(values)} values, but --classes names {len(names)}")
    return values


def question_masks(items: Sequence[Item], meaning: MaskValues, names: Sequence[str] | None, skip_bad: bool) -> None:
    """Raise UserError where the numbers in the masks cannot be what was meant.

    Some masks are read; where they look wrong, more of them, and all before it is said.
    """
    pixels: Counter[int] = Counter()
    first: BadSample | None = None
    order = np.argsort(mix64(1, np.arange(len(items))), kind="stable").tolist()
    fault, wanted = "", _LOOKED_AT
    for place, number in enumerate(order, 1):
        try:
            values, counts = np.unique(meaning.read(items[number].target), return_counts=True)
        except BadSample as error:
            if not skip_bad:
                raise
            first = first or error
            continue
        pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if place >= wanted:
            fault, wanted = implausible(pixels, meaning, names), 2 * wanted
            if not fault:
                return
    if not pixels and first is not None:
        raise first
    if fault := implausible(pixels, meaning, names):
        raise UserError(f"{items[order[0]].target} and the other {len(items) - 1} masks: {fault}")


def implausible(pixels: Counter[int], meaning: MaskValues, names: Sequence[str] | None) -> str:
    """What is strange about masks of so many pixels of each number, and the cure; "" if nothing is."""
    voids, total = meaning.voids, sum(pixels.values())
    seen = sorted(number for number in pixels if number not in voids)
    if not total or meaning.values is not None:
        return ""
    void = 1 - sum(pixels[number] for number in seen) / total
    if not seen:
        return f"every pixel is void ({', '.join(map(str, voids))}); see --ignore and --mask-values"
    if seen == [0] and pixels[VOID] and not meaning.zero_is_void and (names is None or len(names) > 1):
        return (
            f"they hold 0 and 255 alone, and 255 is void: nothing but class 0 would be left, and {void:.0%} of the "
            "pixels void. If 255 is a class, give --mask-values 0,255; if it is void, name the one class with --classes"
        )
    if names is not None:
        return ""
    known = f"give --mask-values {','.join(map(str, seen))}" if len(seen) <= _MANY else "see --mask-values"
    if seen[-1] >= _FEW and len(seen) * _SPARSE <= seen[-1] + 1:
        return (
            f"they hold {len(seen)} numbers up to {seen[-1]}, which would make {seen[-1] + 1} classes. If they "
            f"are shades of grey, {known}; if they are class numbers, name the classes with --classes"
        )
    shares = sorted(pixels[number] / total for number in seen)
    rare = shares[: 3 * len(shares) // 4]
    if len(seen) >= _MANY and sum(rare) < _RARE:
        return (
            f"they hold {len(seen)} numbers, of which {len(rare)} together cover {sum(rare):.2%} of the pixels: shades "
            "that interpolation or compression made? Store masks as PNG and shrink them by the nearest pixel; if they "
            "are class numbers, name the classes with --classes"
        )
    return ""


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
