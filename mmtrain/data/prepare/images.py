"""Folders of images, one folder per class → tar shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from mmtrain.data.prepare.encode import ClassEncoder, Item, check_encoding
from mmtrain.data.prepare.output import Prepared, check_root, existing
from mmtrain.data.prepare.writer import write_dataset
from mmtrain.errors import UserError
from mmtrain.log import logger

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_SPLIT_FOLDERS = {"val": ("val", "valid", "validation"), "test": ("test",)}


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
    source = str(root.absolute())
    if (done := existing(out, source, settings, force=force)) is not None:
        return done
    classes, splits = _find(root, val_fraction, test_fraction)
    return write_dataset(
        out,
        splits,
        classes,
        source,
        settings,
        shard_size=shard_size,
        encoder=ClassEncoder(image_size),
        workers=workers,
        force=force,
    )


def _find(root: Path, val_fraction: float, test_fraction: float) -> tuple[list[str], dict[str, list[Item]]]:
    if not (root / "train").is_dir():
        classes = _classes(root)
        return classes, stratify(root, _items(root, classes), val_fraction, test_fraction)
    classes = _classes(root / "train")
    splits = {"train": _items(root / "train", classes)}
    for split, names in _SPLIT_FOLDERS.items():
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is not None:
            check_classes(folder, _classes(folder), root / "train", classes)
            splits[split] = _items(folder, classes)
    if "val" not in splits and val_fraction > 0:
        logger.info("%s has no val folder: %g of train is set aside", root, val_fraction)
        splits |= stratify(root, splits["train"], val_fraction, 0.0)
    return classes, {split: splits[split] for split in ("train", "val", "test") if splits.get(split)}


def _classes(folder: Path) -> list[str]:
    names = class_folders(folder)
    if not names:
        raise UserError(
            f"{folder}: no class folders: wanted is ROOT/CLASS/IMAGE or ROOT/{{train,val,test}}/CLASS/IMAGE"
        )
    return names


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def check_classes(folder: Path, found: Sequence[str], train: Path, classes: Sequence[str]) -> None:
    """Raise UserError if ``folder`` has classes that the training images in ``train`` do not have."""
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(f"{folder}: classes that {train} does not have: {', '.join(unknown[:5])}")


def image_files(folder: Path) -> list[Path]:
    """The images in ``folder`` and in all folders below it, sorted; hidden ones are left out."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def _items(folder: Path, classes: Sequence[str]) -> list[Item]:
    items = []
    for label, name in enumerate(classes):
        files = image_files(folder / name)
        if not files and folder.name not in {name for names in _SPLIT_FOLDERS.values() for name in names}:
            raise UserError(f"{folder / name}: no images of class {name!r} ({', '.join(sorted(SUFFIXES))})")
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
