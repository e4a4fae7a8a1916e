"""Folders of images, one folder per class → tar shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmtrain.data.images.formats import image_suffixes
from mmtrain.data.prepare.encode import ClassEncoder, Item, check_encoding
from mmtrain.data.prepare.folders import (
    LeftOut,
    check_classes,
    class_folders,
    image_files,
    note_beside,
    split_folders,
)
from mmtrain.data.prepare.output import Origin, Prepared, check_root, existing
from mmtrain.data.prepare.writer import write_dataset
from mmtrain.errors import UserError
from mmtrain.log import logger


def prepare_images(
    root: str | Path,
    out: str | Path,
    *,
    image_size: int | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    force: bool = False,
) -> Prepared:
    """Write OUT/{train,val,test}/shard-*.tar and OUT/meta.json from ROOT/CLASS/* or ROOT/{train,val,test}/CLASS/*.

    With one folder per class, ``val_fraction`` and ``test_fraction`` of each class are set aside by a hash of the file
    names. With ROOT/train the folders are the splits; only a missing ROOT/val is taken from train by ``val_fraction``.
    The names of splits may have any case, and be training, valid, validation and testing. What is no image, hidden or
    beside those folders is counted and told, and in meta.json as ``left_out``.
    ``image_size``: shrink images whose shorter side is longer than that (JPEG quality 95); otherwise files are stored
    as they are. ``workers``: processes (None: one per core, at most 8). A finished OUT is left alone; one that a killed
    or interrupted process began is completed.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    check_root(root, out)
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UserError(
            f"--val-fraction {val_fraction}, --test-fraction {test_fraction}: parts that leave some to train"
        )
    check_encoding(image_size)
    settings = {
        "image_size": image_size,
        "shard_size": shard_size,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
    }
    origin = Origin.of(root)
    if (done := existing(out, origin, settings, force=force)) is not None:
        return done
    left = LeftOut()
    classes, splits = _find(root, val_fraction, test_fraction, left)
    left.tell(root)
    return write_dataset(
        out,
        splits,
        classes,
        origin,
        settings,
        shard_size=shard_size,
        encoder=ClassEncoder(image_size),
        workers=workers,
        force=force,
        summarise=lambda _: {"left_out": dict(left.counts)} if left.counts else {},
    )


def _find(
    root: Path, val_fraction: float, test_fraction: float, left: LeftOut
) -> tuple[list[str], dict[str, list[Item]]]:
    folders = split_folders(root)
    if "train" not in folders:
        for split, folder in folders.items():
            if class_folders(folder):
                raise UserError(
                    f"{root}: {folder.name} holds the folders of a {split} split, but there is no train folder: rename "
                    f"one to train, or give --root {folder} to divide that one"
                )
        classes = _classes(root, left)
        splits = stratify(root, _items(root, classes, left), val_fraction, test_fraction)
        _check_set_aside(root, classes, splits, {"val": val_fraction, "test": test_fraction})
        return classes, splits
    note_beside(root, [folder.name for folder in folders.values()], left)
    train = folders.pop("train")
    classes = _classes(train, left)
    splits = {"train": _items(train, classes, left)}
    for split, folder in folders.items():
        check_classes(folder, _classes(folder, left), train, classes)
        splits[split] = _items(folder, classes, left, some_empty=True)
    if "val" not in splits and val_fraction > 0:
        logger.info("%s has no val folder: %g of train is set aside", root, val_fraction)
        splits |= stratify(root, splits["train"], val_fraction, 0.0)
        _check_set_aside(root, classes, splits, {"val": val_fraction})
    return classes, {split: splits[split] for split in ("train", "val", "test") if splits.get(split)}


def _check_set_aside(
    root: Path, classes: Sequence[str], splits: Mapping[str, Sequence[Item]], asked: Mapping[str, float]
) -> None:
    """Raise UserError where a part that was asked for is empty; say how many classes have nothing in it."""
    for split, fraction in asked.items():
        if not fraction:
            continue
        there = {item.label for item in splits.get(split, ())}
        if not there:
            most = max(Counter(item.label for items in splits.values() for item in items).values())
            raise UserError(
                f"{root}: no class has more than {most} image(s), of which --{split}-fraction {fraction:g} sets none "
                f"aside: give a larger part, or --{split}-fraction 0 to have no {split} split"
            )
        if lacking := [name for label, name in enumerate(classes) if label not in there]:
            logger.warning(
                "%s: %d of %d classes are too small for --%s-fraction %g, so have no image in %s: %s",
                root,
                len(lacking),
                len(classes),
                split,
                fraction,
                split,
                ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else ""),
            )


def _classes(folder: Path, left: LeftOut) -> list[str]:
    names = class_folders(folder)
    if not names:
        raise UserError(
            f"{folder}: no class folders: wanted is ROOT/CLASS/IMAGE or ROOT/{{train,val,test}}/CLASS/IMAGE"
        )
    note_beside(folder, names, left)
    return names


def _items(folder: Path, classes: Sequence[str], left: LeftOut, *, some_empty: bool = False) -> list[Item]:
    items = []
    for label, name in enumerate(classes):
        files = image_files(folder / name, left) if (folder / name).is_dir() else []
        if not files and not some_empty:
            there = f"; left out: {left}" if left.counts else ""
            raise UserError(
                f"{folder / name}: no images of class {name!r} ({', '.join(sorted(image_suffixes()))}){there}"
            )
        items += [Item(label, str(file)) for file in files]
    if not items:
        raise UserError(f"{folder}: no images in its class folders")
    return items


def stratify(root: Path, items: Sequence[Item], val_fraction: float, test_fraction: float) -> dict[str, list[Item]]:
    """Set aside parts of each class, chosen by a hash of each file's name (or content): the same ones every time."""
    splits: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    by_class: dict[int, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    for label, members in sorted(by_class.items()):
        ranked = sorted(members, key=lambda item: _hash(root, item))
        tests, vals = round(len(ranked) * test_fraction), round(len(ranked) * val_fraction)
        if tests + vals >= len(ranked):
            raise UserError(
                f"class number {label} has {len(ranked)} image(s): too few to set some aside; use fractions 0"
            )
        splits["test"] += ranked[:tests]
        splits["val"] += ranked[tests : tests + vals]
        splits["train"] += ranked[tests + vals :]
    return {split: found for split, found in splits.items() if found}


def _hash(root: Path, item: Item) -> bytes:
    name = Path(item.path).relative_to(root).as_posix().encode() if item.path else item.content
    return hashlib.blake2b(name, digest_size=16).digest()
