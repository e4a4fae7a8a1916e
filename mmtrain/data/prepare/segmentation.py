"""Images with a class number for each pixel (ADE20K, CamVid and what is laid out like them) → tar shards."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.prepare.encode import QUALITY, BadSample, Encoded, Item, encode_image, read_file, shrunk, to_bytes
from mmtrain.data.prepare.imagenet_classes import read_lines
from mmtrain.data.prepare.images import SUFFIXES
from mmtrain.data.prepare.writer import Prepared, existing, write_dataset
from mmtrain.errors import UserError

VOID = 255
_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
_LAYOUTS = "wanted is ROOT/images/train with ROOT/annotations/train, or ROOT/train with ROOT/trainannot"


@dataclass(frozen=True)
class MaskEncoder:
    """An image and its mask (``.seg.png``, grey with 8 bits: a class number for each pixel)."""

    image_size: int | None
    quality: int
    classes: int | None  # how many there are (None: any number)
    ignore: tuple[int, ...]
    zero_is_void: bool
    labelled: ClassVar[bool] = False

    def __call__(self, item: Item) -> Encoded:
        from PIL import Image

        suffix, content, size = encode_image(item, self.image_size, self.quality)
        numbers = read_numbers(item.target)
        if numbers.shape != (size[1], size[0]):
            found = f"{numbers.shape[1]} × {numbers.shape[0]}"
            raise BadSample(item.target, f"the mask has {found} pixels, its image {size[0]} × {size[1]}")
        if self.zero_is_void:
            # 0 becomes 255, n becomes n - 1; a void that was 255 before stays one
            numbers = np.where(numbers == VOID, VOID, numbers - np.uint8(1))
        for value in np.unique(numbers).tolist() if self.classes is not None else ():
            if value >= self.classes and value not in self.ignore:
                raise BadSample(
                    item.target, f"holds the class number {value}, but there are {self.classes} classes (see --ignore)"
                )
        mask = Image.fromarray(numbers)
        if self.image_size is not None:
            mask = mask.resize(shrunk(size, self.image_size), Image.Resampling.NEAREST)
        pixels = np.bincount(np.asarray(mask).reshape(-1), minlength=VOID + 1)
        counts = {str(value): int(pixels[value]) for value in np.flatnonzero(pixels)}
        return Encoded({suffix: content, "seg.png": to_bytes(mask, None)}, counts)


def read_numbers(path: str) -> NDArray[np.uint8]:
    """The class numbers (H, W) of a mask file: grey, or the places in a palette. Raises BadSample."""
    from PIL import Image

    content = read_file(path)
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise almost anything for damaged files
        raise BadSample(path, f"the mask cannot be decoded ({type(error).__name__}: {error})") from error
    if image.mode not in ("L", "P") and not image.mode.startswith("I"):
        raise BadSample(path, f"the mask's pixels are {image.mode}, not class numbers (grey, or a palette)")
    numbers = np.asarray(image)
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) <= VOID:
        raise BadSample(path, f"the mask holds class numbers outside of 0 to {VOID}")
    return numbers.astype(np.uint8)


def prepare_segmentation(
    root: str | Path,
    out: str | Path,
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (VOID,),
    zero_is_void: bool = False,
    image_size: int | None = None,
    quality: int = QUALITY,
    shard_size: int = 1000,
    workers: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> Prepared:
    """Write OUT/{train,val,test}/shard-*.tar of images and masks, and OUT/meta.json.

    ROOT/images/SPLIT and ROOT/annotations/SPLIT, or ROOT/SPLIT and ROOT/SPLITannot, hold files of the same stems.
    ``classes``: a file with a name in each line, the first for class 0; masks may then hold no other numbers but those
    of ``ignore``. Without it the classes are numbers. ``zero_is_void``: 0 becomes 255 and n becomes n − 1, as is usual
    for ADE20K; ``ignore`` means the numbers after that. ``image_size``: shrink images and masks (nearest pixel) whose
    shorter side is longer. meta.json has the pixels of each class. The rest is as for ``prepare_imagenet``.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size}: pixels, 1 or more")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality}: 1 to 100")
    if not all(0 <= number <= VOID for number in ignore):
        raise UserError(f"--ignore {' '.join(map(str, ignore))}: class numbers, 0 to {VOID}")
    names = None if classes is None else read_lines(Path(classes).expanduser())
    voids = tuple(sorted({*ignore, VOID} if zero_is_void else set(ignore)))
    settings = {
        "image_size": image_size,
        "quality": quality,
        "shard_size": shard_size,
        "classes": names,
        "ignore": list(voids),
        "zero_is_void": zero_is_void,
    }
    source = str(root.absolute())
    if (done := existing(out, source, settings, force=force)) is not None:
        return done

    def summarise(pixels: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        seen = {int(number) for counts in pixels.values() for number in counts} - set(voids)
        known = names if names is not None else [str(number) for number in range(max(seen, default=-1) + 1)]
        return {"classes": known, "pixels": pixels}

    return write_dataset(
        out,
        _find(root),
        [],
        source,
        settings,
        shard_size=shard_size,
        encoder=MaskEncoder(image_size, quality, None if names is None else len(names), voids, zero_is_void),
        workers=workers,
        force=force,
        keep=True,
        skip_bad=skip_bad,
        further={"kind": "segmentation", "ignore": list(voids)},
        summarise=summarise,
    )


def _find(root: Path) -> dict[str, list[Item]]:
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder (looked for {root.absolute()})")
    splits = {}
    for split, names in _SPLITS.items():
        for name in names:
            for images, masks in (
                (root / "images" / name, root / "annotations" / name),
                (root / name, root / f"{name}annot"),
            ):
                if split not in splits and images.is_dir() and masks.is_dir():
                    splits[split] = _pairs(images, masks)
    if "train" not in splits:
        raise UserError(f"{root}: no training images with masks; {_LAYOUTS}")
    return splits


def _pairs(images: Path, masks: Path) -> list[Item]:
    of_images, of_masks = _by_stem(images), _by_stem(masks)
    for here, there, folder in ((of_images, of_masks, masks), (of_masks, of_images, images)):
        alone = sorted(set(here) - set(there))
        if alone:
            raise UserError(f"{here[alone[0]]}: no file of that stem in {folder} ({len(alone)} such)")
    if not of_images:
        raise UserError(f"{images}: no images")
    return [Item(path=str(of_images[stem]), target=str(of_masks[stem])) for stem in sorted(of_images)]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise UserError(f"{path}: {found[stem].name} has the same stem: one of them must go")
            found[stem] = path
    return found
