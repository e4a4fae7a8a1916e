"""Conversion of folders of images, with one folder per class, to tar shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmtrain.data.images.formats import image_suffixes
from mmtrain.data.prepare.encode import ClassEncoder, Item, check_encoding
from mmtrain.data.prepare.folders import (
    Ignored,
    check_classes,
    class_folders,
    count_others,
    image_files,
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

    If ROOT contains class folders, fractions of each class become the splits val and test, chosen by a hash of the file
    names. If ROOT contains a folder train, its folders are the splits; only a missing val is split off from train.
    Split folders may also be called training, valid, validation or testing, in upper or lower case. Ignored files and
    folders are logged, and counted in meta.json as ``left_out``. An interrupted preparation is completed.

    Args:
        root: folder of the images.
        out: folder to write. A complete one is kept unless ``force`` is set.
        image_size: maximum of the shorter side, in pixels; larger images are shrunk (JPEG quality 95). Other files are
            stored unchanged.
        shard_size: samples per shard.
        workers: processes (None: one per core, at most 8).
        val_fraction, test_fraction: fractions of each class for val and test.
        force: replace an existing folder.

    Raises:
        UserError: for invalid options, or missing or damaged files.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    check_root(root, out)
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UserError(
            f"--val-fraction {val_fraction}, --test-fraction {test_fraction}: must be at least 0, and below 1 in total"
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
    ignored = Ignored()
    classes, splits = _find(root, val_fraction, test_fraction, ignored)
    ignored.warn(root)
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
        summarise=lambda _: {"left_out": dict(ignored.counts)} if ignored.counts else {},
    )


def _find(
    root: Path, val_fraction: float, test_fraction: float, ignored: Ignored
) -> tuple[list[str], dict[str, list[Item]]]:
    folders = split_folders(root)
    if "train" not in folders:
        for split, folder in folders.items():
            if class_folders(folder):
                raise UserError(
                    f"{root}: {folder.name} is a {split} split, but there is no folder train. Rename a folder to "
                    f"train, or use --root {folder} to divide this folder into splits"
                )
        classes = _classes(root, ignored)
        splits = stratify(root, _items(root, classes, ignored), val_fraction, test_fraction)
        _check_set_aside(root, classes, splits, {"val": val_fraction, "test": test_fraction})
        return classes, splits
    count_others(root, [folder.name for folder in folders.values()], ignored)
    train = folders.pop("train")
    classes = _classes(train, ignored)
    splits = {"train": _items(train, classes, ignored)}
    for split, folder in folders.items():
        check_classes(folder, _classes(folder, ignored), train, classes)
        splits[split] = _items(folder, classes, ignored, some_empty=True)
    if "val" not in splits and val_fraction > 0:
        logger.info("%s: no folder val, so a fraction %g of train becomes the val split", root, val_fraction)
        splits |= stratify(root, splits["train"], val_fraction, 0.0)
        _check_set_aside(root, classes, splits, {"val": val_fraction})
    return classes, {split: splits[split] for split in ("train", "val", "test") if splits.get(split)}


def _check_set_aside(
    root: Path, classes: Sequence[str], splits: Mapping[str, Sequence[Item]], fractions: Mapping[str, float]
) -> None:
    """Raise UserError if a requested split is empty. Log a warning if some classes have no images in a split."""
    for split, fraction in fractions.items():
        if not fraction:
            continue
        present = {item.label for item in splits.get(split, ())}
        if not present:
            most = max(Counter(item.label for items in splits.values() for item in items).values())
            raise UserError(
                f"{root}: no class has more than {most} image(s), so --{split}-fraction {fraction:g} gives no images. "
                f"Increase it, or set --{split}-fraction 0 for no {split} split"
            )
        if lacking := [name for label, name in enumerate(classes) if label not in present]:
            logger.warning(
                "%s: %d of %d classes are too small for --%s-fraction %g and have no images in %s: %s",
                root,
                len(lacking),
                len(classes),
                split,
                fraction,
                split,
                ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else ""),
            )


def _classes(folder: Path, ignored: Ignored) -> list[str]:
    names = class_folders(folder)
    if not names:
        raise UserError(
            f"{folder}: no class folders. The expected layout is ROOT/CLASS/IMAGE or "
            "ROOT/{train,val,test}/CLASS/IMAGE"
        )
    count_others(folder, names, ignored)
    return names


def _items(folder: Path, classes: Sequence[str], ignored: Ignored, *, some_empty: bool = False) -> list[Item]:
    items = []
    for label, name in enumerate(classes):
        files = image_files(folder / name, ignored) if (folder / name).is_dir() else []
        if not files and not some_empty:
            hint = f"; ignored: {ignored}" if ignored.counts else ""
            raise UserError(
                f"{folder / name}: no images of class {name!r} ({', '.join(sorted(image_suffixes()))}){hint}"
            )
        items += [Item(label, str(file)) for file in files]
    if not items:
        raise UserError(f"{folder}: no images in its class folders")
    return items


def stratify(root: Path, items: Sequence[Item], val_fraction: float, test_fraction: float) -> dict[str, list[Item]]:
    """Divide the items of each class into train, val and test, reproducibly by a hash of the file name (or content).

    Args:
        root: folder to which the names of the items are relative.
        val_fraction, test_fraction: fractions of each class.

    Returns:
        Split → items, without empty splits.

    Raises:
        UserError: if a class is too small.
    """
    splits: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    by_class: dict[int, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    for label, members in sorted(by_class.items()):
        ranked = sorted(members, key=lambda item: _hash(root, item))
        tests, vals = round(len(ranked) * test_fraction), round(len(ranked) * val_fraction)
        if tests + vals >= len(ranked):
            raise UserError(
                f"class number {label} has only {len(ranked)} image(s), too few for --val-fraction and "
                "--test-fraction. Set both to 0"
            )
        splits["test"] += ranked[:tests]
        splits["val"] += ranked[tests : tests + vals]
        splits["train"] += ranked[tests + vals :]
    return {split: found for split, found in splits.items() if found}


def _hash(root: Path, item: Item) -> bytes:
    name = Path(item.path).relative_to(root).as_posix().encode() if item.path else item.content
    return hashlib.blake2b(name, digest_size=16).digest()
