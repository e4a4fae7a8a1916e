"""Images with boxes and outlines in COCO's format → tar shards."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from mmtrain.data.prepare.encode import QUALITY, BadSample, Encoded, Item, encode_image
from mmtrain.data.prepare.writer import Prepared, existing, write_dataset
from mmtrain.errors import UserError


@dataclass(frozen=True)
class BoxEncoder:
    """An image and the annotations of that image (``.json``, see ``mmtrain.data.images.targets.read_detection``)."""

    quality: int = QUALITY
    labelled: ClassVar[bool] = False

    def __call__(self, item: Item) -> Encoded:
        suffix, content, size = encode_image(item, None, self.quality)
        target = json.loads(item.note)
        if (target["width"], target["height"]) != size:
            said = f"{target['width']} × {target['height']}"
            raise BadSample(item.path, f"the image has {size[0]} × {size[1]} pixels, its annotations say {said}")
        return Encoded({suffix: content, "json": item.note}, dict(Counter(str(label) for label in target["labels"])))


def prepare_coco(
    images: str | Path,
    annotations: str | Path,
    out: str | Path,
    *,
    val_images: str | Path | None = None,
    val_annotations: str | Path | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> Prepared:
    """Write OUT/train/shard-*.tar (and OUT/val) of images with their annotations, and OUT/meta.json.

    ``annotations`` is a file like instances_train2017.json. Categories become class indices in the order of their ids,
    which meta.json keeps as ``category_ids`` for an evaluation by COCO's tools, with the boxes of each class. Images
    without annotations stay, and all keep their size. The rest is as for ``prepare_imagenet``.
    """
    out = Path(out).expanduser()
    if (val_images is None) != (val_annotations is None):
        raise UserError("--val-images and --val-annotations go together")
    given = {"train": (Path(images).expanduser(), Path(annotations).expanduser())}
    if val_images is not None and val_annotations is not None:
        given["val"] = (Path(val_images).expanduser(), Path(val_annotations).expanduser())
    source = "; ".join(f"{folder.absolute()}, {file.absolute()}" for folder, file in given.values())
    settings = {"shard_size": shard_size}
    if (done := existing(out, source, settings, force=force)) is not None:
        return done
    categories: list[tuple[int, str]] | None = None
    splits = {}
    for split, (folder, file) in given.items():
        content = _read(file)
        found = _categories(content, file)
        if categories is not None and found != categories:
            raise UserError(f"{file}: other categories than {given['train'][1]}")
        categories = found
        splits[split] = _items(content, folder, file, {number: place for place, (number, _) in enumerate(found)})
    assert categories is not None

    return write_dataset(
        out,
        splits,
        [name for _, name in categories],
        source,
        settings,
        shard_size=shard_size,
        encoder=BoxEncoder(),
        workers=workers,
        force=force,
        keep=True,
        skip_bad=skip_bad,
        further={"kind": "detection", "category_ids": [number for number, _ in categories]},
        summarise=lambda boxes: {"boxes": boxes},
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        raise UserError(f"{file}: cannot read the annotations ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{file}: not annotations in COCO's format: no list {key!r}")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{file}: {key!r} holds something else than objects")
    return content


def _categories(content: dict[str, Any], file: Path) -> list[tuple[int, str]]:
    try:
        found = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{file}: categories need "id" and "name" ({error!r})') from error
    if len({number for number, _ in found}) != len(found) or not found:
        raise UserError(f"{file}: {'a category id is there twice' if found else 'no categories'}")
    return found


def _items(content: dict[str, Any], folder: Path, file: Path, classes: Mapping[int, int]) -> list[Item]:
    targets: dict[int, dict[str, Any]] = {}
    for entry in content["images"]:
        try:
            number, name = int(entry["id"]), str(entry["file_name"])
            width, height = int(entry["width"]), int(entry["height"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'{file}: images need "id", "file_name", "width" and "height" ({error!r})') from error
        if number in targets:
            raise UserError(f"{file}: image {number} is there twice")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{file}: image {number}: {name!r} leads out of {folder}")
        lists: dict[str, Any] = {key: [] for key in ("ids", "boxes", "labels", "areas", "iscrowd", "segmentations")}
        targets[number] = {"image_id": number, "file_name": name, "width": width, "height": height, **lists}
    for entry in content["annotations"]:
        _add(entry, targets, file, classes)
    if not targets:
        raise UserError(f"{file}: lists no images")
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
        raise UserError(f"{where}: no such image or category ({error!r})") from error
    try:
        x, y, width, height = (float(value) for value in entry["bbox"])
        area = float(entry.get("area", width * height))
        number, crowd = int(entry.get("id", 0)), int(entry.get("iscrowd", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{where}: needs "bbox" with x, y, width and height in pixels ({error!r})') from error
    if not all(map(math.isfinite, (x, y, width, height, area))) or min(width, height) < 0:
        raise UserError(f"{where}: bbox {entry['bbox']}: finite numbers, and no negative width or height")
    outline = entry.get("segmentation", [])
    if not _is_outline(outline, target):
        raise UserError(f"{where}: segmentation is neither polygons (x, y, x, y, ...) nor RLE of the image's size")
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
