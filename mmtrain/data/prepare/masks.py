"""Reading of mask files as class numbers per pixel, and checking that the numbers are plausible.

A photo with an EXIF orientation is rotated upright when it is decoded. Its masks and boxes may have been created on the
upright photo or on the stored pixels. The sizes or the option ``--turned`` tell which, and the targets are rotated if
necessary.
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
#: Minimum number of masks that are checked before any is written.
_CHECKED = 64
#: Masks whose largest number is at least _FEW are suspicious if at most one in _SPARSE of the numbers up to it occurs.
_SPARSE, _FEW = 8, 16
#: Masks with at least _MANY numbers are suspicious if the rarest three quarters of the numbers cover less than a
#: fraction _RARE of the pixels. Interpolation creates such numbers.
_MANY, _RARE = 30, 0.005


@dataclass(frozen=True)
class MaskValues:
    """The meaning of the values in mask files."""

    values: tuple[int, ...] | None = None  # value of class 0, class 1, ... in the files; None: the class numbers
    ignore: tuple[int, ...] = (VOID,)  # numbers that are void (no class)
    zero_is_void: bool = False  # map 0 to 255 (void) and n to n - 1; ``ignore`` refers to the numbers after that

    @property
    def voids(self) -> tuple[int, ...]:
        """The void numbers in the result of ``read``."""
        if self.values is not None:
            return (VOID,)
        return tuple(sorted({*self.ignore, VOID} if self.zero_is_void else set(self.ignore)))

    def read(self, path: str) -> NDArray[np.uint8]:
        """Read the class numbers (H, W) of a mask file, which are grey values, 0 and 1, or palette indices.

        Raises:
            BadSample: if the file cannot be decoded or has invalid values.
        """
        stored, lossy = _stored(path)
        if self.values is not None:
            return self._mapped(path, stored, lossy)
        if lossy:
            raise BadSample(
                path,
                "the mask is a JPEG, whose compression changes class numbers (store masks as PNG, or set --mask-values "
                "to the values before compression)",
            )
        if not self.zero_is_void:
            return stored
        # 0 becomes 255 (void), n becomes n - 1, and 255 stays void.
        return np.where(stored == VOID, VOID, stored - np.uint8(1)).astype(np.uint8)

    def _mapped(self, path: str, stored: NDArray[np.uint8], lossy: bool) -> NDArray[np.uint8]:
        assert self.values is not None
        known = [*self.values, *(value for value in self.ignore if value not in self.values)]
        numbers = [*range(len(self.values)), *[VOID] * (len(known) - len(self.values))]
        if lossy:  # map each value to the nearest known one
            distance = np.abs(np.arange(VOID + 1)[:, None] - np.array(known)[None])
            return np.array(numbers, dtype=np.uint8)[distance.argmin(1)][stored]
        if unknown := sorted(set(np.unique(stored).tolist()) - set(known)):
            raise BadSample(path, f"contains the value {unknown[0]}, which is not in --mask-values or --ignore")
        table = np.zeros(VOID + 1, dtype=np.uint8)
        table[known] = numbers
        return table[stored]


def _stored(path: str) -> tuple[NDArray[np.uint8], bool]:
    """Return the values (H, W) in a mask file, and whether its format is lossy."""
    content = read_file(path)
    try:
        image = open_image(content)
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise almost anything for damaged files
        raise BadSample(path, f"the mask cannot be decoded ({type(error).__name__}: {error})") from error
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise BadSample(path, f"the mask's mode is {image.mode}, but class numbers need a grey or palette image")
    numbers = np.asarray(image)
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) <= VOID:
        raise BadSample(path, f"the mask contains numbers outside of the range 0 to {VOID}")
    return numbers.astype(np.uint8), image.format in ("JPEG", "MPO")


@dataclass(frozen=True)
class MaskEncoder:
    """Encodes an image and its mask (``.seg.png``, 8-bit grey: the class number of each pixel)."""

    image_size: int | None  # maximum of the shorter side, in pixels; larger images are shrunk
    quality: int  # of JPEGs that are encoded again
    classes: int | None  # number of classes; None: not checked
    meaning: MaskValues
    turned: str | None = None  # "upright" or "stored", see ``turn_wanted``
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
                    item.target,
                    f"contains the class number {value}, but there are only {self.classes} classes (see --ignore)",
                )
        mask = Image.fromarray(numbers)
        if self.image_size is not None:
            mask = mask.resize(shrunk(size, self.image_size), Image.Resampling.NEAREST)
        pixels = np.bincount(np.asarray(mask).reshape(-1), minlength=VOID + 1)
        counts = {str(value): int(pixels[value]) for value in np.flatnonzero(pixels)}
        return Encoded({suffix: content, "seg.png": to_bytes(mask, None)}, counts)


def parse_values(text: str | None, names: Sequence[str] | None) -> tuple[int, ...] | None:
    """Parse ``--mask-values``, for example "0,255". Raises UserError if it is invalid or does not match ``names``."""
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(set(values)) != len(values) or not values or not all(0 <= value <= VOID for value in values):
        raise UserError(
            f"--mask-values {text}: must be distinct numbers from 0 to {VOID}, separated by commas: the pixel values "
            "of class 0, 1, ..., for example 0,255"
        )
    if names is not None and len(names) != len(values):
        raise UserError(f"--mask-values {text}: {len(values)} values, but --classes has {len(names)} names")
    return values


def check_masks(items: Sequence[Item], meaning: MaskValues, names: Sequence[str] | None, skip_bad: bool) -> None:
    """Raise UserError if the numbers in the masks are implausible.

    A random selection of the masks is read. As long as it looks implausible, more masks are read; the error is raised
    only after all masks were read.
    """
    pixels: Counter[int] = Counter()
    first: BadSample | None = None
    order = np.argsort(mix64(1, np.arange(len(items))), kind="stable").tolist()
    fault, least = "", _CHECKED
    for place, number in enumerate(order, 1):
        try:
            values, counts = np.unique(meaning.read(items[number].target), return_counts=True)
        except BadSample as error:
            if not skip_bad:
                raise
            first = first or error
            continue
        pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if place >= least:
            fault, least = implausible(pixels, meaning, names), 2 * least
            if not fault:
                return
    if not pixels and first is not None:
        raise first
    if fault := implausible(pixels, meaning, names):
        raise UserError(f"{items[order[0]].target} and the other {len(items) - 1} masks: {fault}")


def implausible(pixels: Counter[int], meaning: MaskValues, names: Sequence[str] | None) -> str:
    """Return why the numbers in masks are implausible, with a cure ("": they are plausible).

    Args:
        pixels: number of pixels of each number, over all masks.
    """
    voids, total = meaning.voids, sum(pixels.values())
    seen = sorted(number for number in pixels if number not in voids)
    if not total or meaning.values is not None:
        return ""
    void = 1 - sum(pixels[number] for number in seen) / total
    if not seen:
        return f"every pixel is void ({', '.join(map(str, voids))}). Check --ignore and --mask-values"
    if seen == [0] and pixels[VOID] and not meaning.zero_is_void and (names is None or len(names) > 1):
        return (
            f"they contain only 0 and 255. Since 255 is void, class 0 would be the only class, and {void:.0%} of the "
            "pixels would be void. If 255 is a class, set --mask-values 0,255; if it is void, set --classes to a file "
            "with the name of the class"
        )
    if names is not None:
        return ""
    known = f"set --mask-values {','.join(map(str, seen))}" if len(seen) <= _MANY else "see --mask-values"
    if seen[-1] >= _FEW and len(seen) * _SPARSE <= seen[-1] + 1:
        return (
            f"they contain {len(seen)} different numbers up to {seen[-1]}, which would mean {seen[-1] + 1} classes. If "
            f"the numbers are shades of grey, {known}; if they are class numbers, name the classes with --classes"
        )
    shares = sorted(pixels[number] / total for number in seen)
    rare = shares[: 3 * len(shares) // 4]
    if len(seen) >= _MANY and sum(rare) < _RARE:
        return (
            f"they contain {len(seen)} different numbers, {len(rare)} of which together cover {sum(rare):.2%} of the "
            "pixels, as if interpolation or compression had created them. Store masks as PNG, and shrink them with "
            "nearest-neighbour interpolation; if the numbers are class numbers, name the classes with --classes"
        )
    return ""


CHOICES = ("upright", "stored")
Size = tuple[int, int]  # (W, H)


def check_choice(turned: str | None) -> None:
    """Raise UserError for an invalid ``--turned``."""
    if turned is not None and turned not in CHOICES:
        raise UserError(f"--turned {turned}: must be {' or '.join(CHOICES)}")


def turn_wanted(path: str, turn: int, size: Size, found: Size, choice: str | None) -> int:
    """Return the EXIF orientation by which the targets must be rotated to match the upright photo (1: not at all).

    Args:
        path: file of the targets, for messages.
        turn: EXIF orientation of the photo.
        size: size (W, H) of the upright photo.
        found: size (W, H) of the image on which the targets were created.
        choice: "upright" or "stored": the image on which the targets were created. None: infer it from the sizes.

    Raises:
        BadSample: if the sizes do not match, or are ambiguous and ``choice`` is None.
    """
    stored = size[::-1] if turn >= 5 else size
    prefix = f"the photo has the EXIF orientation {turn}, and " if turn != 1 else ""
    if found not in {"upright": (size,), "stored": (stored,)}.get(choice or "", (size, stored)):
        raise BadSample(
            path, f"{prefix}its targets are for {found[0]} × {found[1]} pixels, but the image has {size[0]} × {size[1]}"
        )
    if turn == 1 or choice == "upright":
        return 1
    if choice is None and size == stored:
        raise BadSample(
            path,
            f"{prefix}its size does not show whether its targets were created on the upright photo (set --turned "
            "upright) or on the stored pixels (set --turned stored)",
        )
    return turn if choice == "stored" or found == stored else 1


def turn_array(stored: NDArray[Any], turn: int) -> NDArray[Any]:
    """Rotate a stored image (H, W) with EXIF orientation ``turn`` upright."""
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
    """Convert points (n, 2), x and y in a stored image of ``size`` (W, H), to points in the upright image."""
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
    """Convert the annotations of a stored image to annotations of the upright image.

    Raises:
        BadSample: for compressed RLE, which cannot be rotated.
    """
    size = (target["width"], target["height"])

    def turned(numbers: list[float]) -> NDArray[np.float64]:
        return turn_points(np.array(numbers, dtype=np.float64).reshape(-1, 2), turn, size)

    def outline(found: Any) -> Any:
        if isinstance(found, list):
            return [turned(polygon).reshape(-1).tolist() for polygon in found]
        if not isinstance(found["counts"], list):
            raise BadSample(
                path, "its compressed outline (RLE) cannot be rotated with the photo (store the photo and RLE upright)"
            )
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
    """Rotate COCO run lengths, which go column by column and begin with the pixels outside of the object."""
    width, height = size
    runs = np.array(counts, dtype=np.int64)
    if runs.min(initial=0) < 0 or int(runs.sum()) != width * height:
        raise BadSample(path, f"the run lengths of an outline do not add up to {width} × {height} pixels")
    inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
    flat = turn_array(inside, turn).T.reshape(-1)
    borders = np.flatnonzero(np.diff(flat, prepend=0)) if len(flat) else np.empty(0, np.int64)
    lengths = np.diff(np.concatenate([[0], borders, [len(flat)]]))
    return {"size": [width, height] if turn >= 5 else [height, width], "counts": lengths.tolist()}
