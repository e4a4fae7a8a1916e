"""Conversion of images with targets to tar shards: masks (ADE20K, CamVid), or boxes and outlines (COCO)."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from mmtrain.data.images.photo import orientation
from mmtrain.data.prepare.encode import (
    QUALITY,
    Encoded,
    Item,
    check_encoding,
    encode_image,
    read_file,
    read_lines,
)
from mmtrain.data.prepare.folders import SPLIT_NAMES, Ignored, image_files, split_folders
from mmtrain.data.prepare.masks import (
    VOID,
    MaskEncoder,
    MaskValues,
    check_choice,
    check_masks,
    parse_values,
    turn_annotations,
    turn_wanted,
)
from mmtrain.data.prepare.output import Origin, Prepared, check_root, existing
from mmtrain.data.prepare.writer import write_dataset
from mmtrain.errors import UserError

_LAYOUTS = "The expected layout is ROOT/images/train with ROOT/annotations/train, or ROOT/train with ROOT/trainannot"


def prepare_segmentation(
    root: str | Path,
    out: str | Path,
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (VOID,),
    zero_is_void: bool = False,
    mask_values: str | None = None,
    turned: str | None = None,
    image_size: int | None = None,
    quality: int = QUALITY,
    shard_size: int = 1000,
    workers: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> Prepared:
    """Write OUT/{train,val,test}/shard-*.tar of images and masks, and OUT/meta.json.

    ROOT/images/SPLIT and ROOT/annotations/SPLIT, or ROOT/SPLIT and ROOT/SPLITannot, must contain files with the same
    stems. meta.json lists the number of pixels of each class.

    Args:
        classes: a file with the name of a class on each line, beginning with class 0. The masks must then contain only
            these classes and the numbers in ``ignore``. None: the names are the class numbers.
        ignore: numbers in the masks that are void (no class).
        zero_is_void: map 0 to 255 (void) and n to n − 1, as usual for ADE20K. ``ignore`` refers to the numbers after
            that.
        mask_values: value of each class in the masks, for example "0,255" for class 0 and 1. Each pixel of a JPEG gets
            the class of the nearest value.
        turned: "upright" or "stored": the image on which masks of photos with an EXIF orientation were created.
        image_size: maximum of the shorter side, in pixels. Larger images and masks (nearest neighbour) are shrunk.
        root, out, quality, shard_size, workers, skip_bad, force: as for ``prepare_imagenet``.

    Raises:
        UserError: for invalid options, missing or damaged files, and implausible masks.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    check_encoding(image_size, quality)
    if not all(0 <= number <= VOID for number in ignore):
        raise UserError(f"--ignore {' '.join(map(str, ignore))}: must be numbers from 0 to {VOID}")
    names = None if classes is None else read_lines(Path(classes).expanduser())
    if mask_values is not None and zero_is_void:
        raise UserError("--mask-values and --zero-is-void must not be given together. Remove one of them")
    check_choice(turned)
    meaning = MaskValues(parse_values(mask_values, names), tuple(ignore), zero_is_void)
    voids = meaning.voids
    settings = {
        "image_size": image_size,
        "quality": quality,
        "shard_size": shard_size,
        "classes": names,
        "ignore": list(voids),
        "zero_is_void": zero_is_void,
        "mask_values": mask_values,
        "turned": turned,
    }
    origin = Origin.of(root)
    if (done := existing(out, origin, settings, force=force)) is not None:
        return done

    def summarise(pixels: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        seen = {int(number) for counts in pixels.values() for number in counts} - set(voids)
        numbers = meaning.values or range(max(seen, default=-1) + 1)
        known = names if names is not None else [str(number) for number in numbers]
        return {"kind": "segmentation", "ignore": list(voids), "classes": known, "pixels": pixels}

    splits = _find_masks(root)
    check_masks([item for items in splits.values() for item in items], meaning, names, skip_bad)
    return write_dataset(
        out,
        splits,
        [],
        origin,
        settings,
        shard_size=shard_size,
        encoder=MaskEncoder(image_size, quality, None if names is None else len(names), meaning, turned),
        workers=workers,
        force=force,
        keep=True,
        skip_bad=skip_bad,
        summarise=summarise,
    )


def _find_masks(root: Path) -> dict[str, list[Item]]:
    check_root(root)
    pairs: dict[str, tuple[Path, Path]] = {}
    if (root / "images").is_dir() and (root / "annotations").is_dir():
        masks = split_folders(root / "annotations")
        images = split_folders(root / "images")
        pairs = {split: (folder, masks[split]) for split, folder in images.items() if split in masks}
    for split, folder in split_folders(root).items():
        beside = folder.with_name(f"{folder.name}annot")
        if beside.is_dir():
            pairs.setdefault(split, (folder, beside))
    if "train" not in pairs:
        raise UserError(f"{root}: no training images with masks. {_LAYOUTS}")
    ignored = Ignored()
    found = {split: _pairs(*pairs[split], ignored) for split in SPLIT_NAMES if split in pairs}
    ignored.warn(root)
    return found


def _pairs(images: Path, masks: Path, ignored: Ignored) -> list[Item]:
    by_stem: dict[Path, dict[str, Path]] = {images: {}, masks: {}}
    for folder, found in by_stem.items():
        for path in image_files(folder, ignored):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise UserError(f"{path}: {found[stem].name} has the same name without extension. Remove one of them")
            found[stem] = path
    for folder, other in ((images, masks), (masks, images)):
        if alone := sorted(set(by_stem[folder]) - set(by_stem[other])):
            first = by_stem[folder][alone[0]]
            raise UserError(
                f"{first}: {other} has no file of the same name without extension ({len(alone)} such file(s)). Add the "
                "missing files, or remove these"
            )
    if not by_stem[images]:
        raise UserError(f"{images}: no images")
    return [Item(path=str(path), target=str(by_stem[masks][stem])) for stem, path in sorted(by_stem[images].items())]


@dataclass(frozen=True)
class BoxEncoder:
    """Encodes an image and its annotations (``.json``, see ``mmtrain.data.images.targets.read_detection``)."""

    turned: str | None = None  # "upright" or "stored", see ``masks.turn_wanted``
    labelled: ClassVar[bool] = False

    def __call__(self, item: Item) -> Encoded:
        item = item._replace(content=item.content or read_file(item.path))
        suffix, content, size = encode_image(item, None, QUALITY)
        target = json.loads(item.note)
        counts = dict(Counter(str(label) for label in target["labels"]))
        found = target["width"], target["height"]
        turn = turn_wanted(item.path, orientation(item.content), size, found, self.turned)
        if turn == 1:
            return Encoded({suffix: content, "json": item.note}, counts)
        note = json.dumps(turn_annotations(item.path, target, turn), separators=(",", ":")).encode()
        return Encoded({suffix: content, "json": note}, counts)


def prepare_coco(
    images: str | Path,
    annotations: str | Path,
    out: str | Path,
    *,
    val_images: str | Path | None = None,
    val_annotations: str | Path | None = None,
    turned: str | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> Prepared:
    """Write OUT/train/shard-*.tar (and OUT/val) of images with their annotations, and OUT/meta.json.

    Categories become class indices in the order of their ids. meta.json stores the ids as ``category_ids``, for
    evaluation with COCO's tools, and the number of boxes of each class. Images without annotations are included. Images
    are not resized.

    Args:
        images: folder of the training images.
        annotations: file of the training annotations, such as instances_train2017.json.
        val_images, val_annotations: the same for validation.
        turned: "upright" or "stored": the image on which annotations of photos with an EXIF orientation were created.
        out, shard_size, workers, skip_bad, force: as for ``prepare_imagenet``.

    Raises:
        UserError: for missing or damaged files.
    """
    out = Path(out).expanduser()
    if (val_images is None) != (val_annotations is None):
        raise UserError("--val-images and --val-annotations must be given together")
    given = {"train": (Path(images).expanduser(), Path(annotations).expanduser())}
    if val_images is not None and val_annotations is not None:
        given["val"] = (Path(val_images).expanduser(), Path(val_annotations).expanduser())
    named = "; ".join(", ".join(map(os.path.realpath, pair)) for pair in given.values())
    origin = Origin(named, tuple(path for pair in given.values() for path in pair))
    check_choice(turned)
    settings = {"shard_size": shard_size, "turned": turned}
    if (done := existing(out, origin, settings, force=force)) is not None:
        return done
    contents = {split: _read_annotations(file) for split, (_, file) in given.items()}
    categories = _categories(contents["train"], given["train"][1])
    classes = {number: place for place, (number, _) in enumerate(categories)}
    splits = {}
    for split, (folder, file) in given.items():
        if _categories(contents[split], file) != categories:
            raise UserError(f"{file}: the categories differ from those of {given['train'][1]}. Use the same categories")
        splits[split] = _coco_items(contents[split], folder, file, classes)
    return write_dataset(
        out,
        splits,
        [name for _, name in categories],
        origin,
        settings,
        shard_size=shard_size,
        encoder=BoxEncoder(turned),
        workers=workers,
        force=force,
        keep=True,
        skip_bad=skip_bad,
        summarise=lambda boxes: {"kind": "detection", "category_ids": [n for n, _ in categories], "boxes": boxes},
    )


def _read_annotations(file: Path) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        raise UserError(f"{file}: cannot read the annotations ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{file}: not annotations in COCO's format: there is no list {key!r}")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{file}: the list {key!r} must contain only objects")
    return content


def _categories(content: dict[str, Any], file: Path) -> list[tuple[int, str]]:
    try:
        found = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f'{file}: each category must have "id" and "name" ({error!r})') from error
    if len({number for number, _ in found}) != len(found) or not found:
        raise UserError(f"{file}: {'a category id is repeated' if found else 'there are no categories'}")
    return found


def _coco_items(content: dict[str, Any], folder: Path, file: Path, classes: Mapping[int, int]) -> list[Item]:
    targets: dict[int, dict[str, Any]] = {}
    for entry in content["images"]:
        try:
            number, name = int(entry["id"]), str(entry["file_name"])
            width, height = int(entry["width"]), int(entry["height"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f'{file}: each image must have "id", "file_name", "width" and "height" ({error!r})'
            ) from error
        if number in targets:
            raise UserError(f"{file}: the image id {number} is repeated")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{file}: image {number}: the path {name!r} is outside of {folder}")
        lists: dict[str, Any] = {key: [] for key in ("ids", "boxes", "labels", "areas", "iscrowd", "segmentations")}
        targets[number] = {"image_id": number, "file_name": name, "width": width, "height": height, **lists}
    for entry in content["annotations"]:
        _add(entry, targets, file, classes)
    if not targets:
        raise UserError(f"{file}: the list of images is empty")
    missing = [target["file_name"] for target in targets.values() if not (folder / target["file_name"]).is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} of {len(targets)} images are missing: {', '.join(missing[:5])}")
    return [
        Item(path=str(folder / target["file_name"]), note=json.dumps(target, separators=(",", ":")).encode())
        for _, target in sorted(targets.items())
    ]


def _add(entry: dict[str, Any], targets: dict[int, dict[str, Any]], file: Path, classes: Mapping[int, int]) -> None:
    where = f"{file}: annotation {entry.get('id')}"
    try:
        target, label = targets[entry["image_id"]], classes[entry["category_id"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: its image or category does not exist ({error!r})") from error
    try:
        x, y, width, height = (float(value) for value in entry["bbox"])
        area = float(entry.get("area", width * height))
        number, crowd = int(entry.get("id", 0)), int(entry.get("iscrowd", 0))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f'{where}: must have a "bbox" with x, y, width and height in pixels ({error!r})') from error
    if not all(map(math.isfinite, (x, y, width, height, area))) or min(width, height) < 0:
        raise UserError(
            f"{where}: bbox {entry['bbox']}: numbers must be finite, and width and height must not be negative"
        )
    outline = entry.get("segmentation", [])
    if not _is_outline(outline, target):
        raise UserError(f"{where}: segmentation must be polygons (x, y, x, y, ...) or RLE, with the size of the image")
    target["ids"].append(number)
    target["boxes"].append([x, y, x + width, y + height])
    target["labels"].append(label)
    target["areas"].append(area)
    target["iscrowd"].append(crowd)
    target["segmentations"].append(outline)


def _is_outline(outline: object, target: Mapping[str, Any]) -> bool:
    if isinstance(outline, dict):
        right = outline.get("size") == [target["height"], target["width"]]
        return right and isinstance(outline.get("counts"), list | str)
    return isinstance(outline, list) and all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(isinstance(value, int | float) for value in polygon)
        for polygon in outline
    )
