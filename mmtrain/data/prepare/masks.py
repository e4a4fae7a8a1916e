"""Mask files → class numbers for each pixel, and whether these can be what was meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.core.order import mix64
from mmtrain.data.images.formats import open_image
from mmtrain.data.images.photo import orientation
from mmtrain.data.prepare.encode import BadSample, Encoded, Item, encode_image, read_file, shrunk, to_bytes
from mmtrain.data.prepare.turned import turn_array, turn_wanted
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

    ``classes``: how many there are (None: any number). ``turned``: see ``mmtrain.data.prepare.turned``.
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
