"""Conversion of the downloaded ImageNet data set (ILSVRC 2012) to tar shards.

The index of a class is the position of its WordNet id (WNID) in sorted order, as in torchvision and timm. The ILSVRC
ids of the devkit (1 to 1000) have a different order, which only the devkit's ``meta.mat`` defines.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.data.prepare.encode import QUALITY, ClassEncoder, Item, check_encoding, package_file, read_lines
from mmtrain.data.prepare.folders import Ignored, check_classes, class_folders, count_others, files_in
from mmtrain.data.prepare.output import Origin, Prepared, check_root, existing
from mmtrain.data.prepare.writer import write_dataset
from mmtrain.errors import UserError
from mmtrain.log import logger

CLASSES, TRAIN, VAL = 1000, 1_281_167, 50_000
_VAL_OF_CLASS = VAL // CLASSES
_LEAST_OF_CLASS = 732  # number of training images of the smallest classes
_LAYOUTS = (
    "The expected layout is ROOT/train/WNID/*.JPEG with ROOT/val/WNID/*.JPEG or ROOT/val/*.JPEG, or Kaggle's "
    "ROOT/ILSVRC/Data/CLS-LOC/{train,val}"
)
_WANTED = "Each line must be a WNID or a class index, in the order of the file names, or a file name followed by these"
_NUMBER = re.compile(r"[0-9]{1,9}")  # str.isdigit also accepts ²
WNID = re.compile(r"n\d{8}")


@dataclass
class _Layout:
    """The paths of the images and of the accompanying lists (None: not found)."""

    train: Path
    val: Path
    names: Path | None = None  # LOC_synset_mapping.txt
    val_labels: Path | None = None
    devkit: Path | None = None  # meta.mat
    ids: bool = True  # whether numbers in val_labels are ILSVRC ids (if there is a devkit)
    train_list: Path | None = None  # ImageSets/CLS-LOC/train_cls.txt


def prepare_imagenet(
    root: str | Path,
    out: str | Path,
    *,
    image_size: int | None = None,
    quality: int = QUALITY,
    shard_size: int = 1000,
    workers: int | None = None,
    expect: str = "full",
    val_labels: str | Path | None = None,
    devkit: str | Path | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> Prepared:
    """Write OUT/{train,val}/shard-*.tar, and OUT/meta.json with ``classes`` (the WNIDs in the order of their indices).

    An interrupted preparation, also one that failed, continues after its finished shards.

    Args:
        root: folder of the downloaded images.
        out: folder to write. A complete one is kept unless ``force`` is set.
        image_size: maximum of the shorter side, in pixels; larger images are shrunk.
        quality: of JPEGs that are encoded again.
        shard_size: samples per shard.
        workers: processes (None: one per core, at most 8).
        expect: "full" requires 1,281,167 training and 50,000 validation images of the 1000 classes; "any" accepts any
            images.
        val_labels, devkit: labels of a validation folder without class folders, see ``read_val_labels``.
        skip_bad: skip images that cannot be decoded, and list them in OUT/skipped.txt, instead of raising an error.
        force: replace an existing folder.

    Raises:
        UserError: for invalid options, or missing or damaged files.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    if expect not in ("full", "any"):
        raise UserError(f"--expect {expect}: must be full or any")
    check_encoding(image_size, quality)
    layout = _locate(root)
    if out.absolute().is_relative_to(layout.train.absolute()) or out.absolute() == root.absolute():
        raise UserError(f"--out {out}: must not be --root or a folder of its images. Use another folder")
    if val_labels is not None:
        layout.val_labels = Path(val_labels).expanduser()
        layout.ids = "ground_truth" in layout.val_labels.name
    if devkit is not None:
        layout.devkit, layout.ids = Path(devkit).expanduser(), True
    settings = {
        "image_size": image_size,
        "quality": quality,
        "shard_size": shard_size,
        "val_labels": None if val_labels is None else str(layout.val_labels),
    }
    origin = Origin.of(root, val_labels)
    if (done := existing(out, origin, settings, force=force)) is not None:
        return done
    classes = class_folders(layout.train)
    if not classes:
        raise UserError(f"{layout.train}: no class folders. {_LAYOUTS}")
    strange = [name for name in classes if not WNID.fullmatch(name)]
    if strange:
        raise UserError(
            f"{layout.train}: the names of some folders are not WNIDs: {', '.join(strange[:5])}. For other classes use "
            "`mmtrain data prepare images`"
        )
    ignored = Ignored()
    count_others(layout.train, classes, ignored)
    train = _items(layout.train, classes, ignored)
    val = _validation(layout, classes, ignored, given=val_labels is not None)
    ignored.warn(root)
    if expect == "full":
        _check_full(layout, classes, train, val)
    elif not train:
        raise UserError(f"{layout.train}: no images in its class folders")
    names = _names(layout, classes)
    return write_dataset(
        out,
        {"train": train, "val": val} if val else {"train": train},
        classes,
        origin,
        settings,
        shard_size=shard_size,
        encoder=ClassEncoder(image_size, quality),
        workers=workers,
        force=force,
        keep=True,
        skip_bad=skip_bad,
        summarise=lambda _: {"names": names} if names else {},
    )


def _locate(root: Path) -> _Layout:
    check_root(root)
    base = next((b for b in (root / "ILSVRC", root) if (b / "Data" / "CLS-LOC" / "train").is_dir()), None)
    images = root if base is None else base / "Data" / "CLS-LOC"
    train = images / "train"
    if not train.is_dir():
        raise UserError(f"{root}: no folder of training images. {_LAYOUTS}")
    val = next((images / name for name in ("val", "validation") if (images / name).is_dir()), images / "val")
    layout = _Layout(train, val)
    for folder in (root, root.parent) if base == root else (root,):  # Kaggle's lists are next to the folder ILSVRC
        layout.names = layout.names or _file(folder / "LOC_synset_mapping.txt")
        layout.val_labels = layout.val_labels or _file(folder / "LOC_val_solution.csv")
    if base is not None:
        layout.train_list = _file(base / "ImageSets" / "CLS-LOC" / "train_cls.txt")
    for folder in (root, root / "data", *sorted(root.glob("ILSVRC2012_devkit*/data"))):
        layout.devkit = layout.devkit or _file(folder / "meta.mat")
        layout.val_labels = layout.val_labels or _file(folder / "ILSVRC2012_validation_ground_truth.txt")
    return layout


def _file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _validation(layout: _Layout, classes: list[str], ignored: Ignored, *, given: bool) -> list[Item]:
    if not layout.val.is_dir():
        if given:
            raise UserError(f"--val-labels: there is no folder {layout.val} of validation images")
        logger.warning("%s: no such folder, so the data set will have no validation images", layout.val)
        return []
    folders = class_folders(layout.val)
    files = files_in(layout.val, Ignored() if folders else ignored)
    if not folders:
        return _flat(layout, files, classes)
    if files or given:
        if files:
            raise UserError(f"{layout.val}: contains both class folders and images. Remove one or the other")
        raise UserError(f"{layout.val}: contains class folders, so --val-labels must not be given")
    check_classes(layout.val, folders, layout.train, classes)
    return _items(layout.val, classes, ignored)


def _items(folder: Path, classes: Sequence[str], ignored: Ignored) -> list[Item]:
    return [
        Item(label, os.path.join(folder, name, file))
        for label, name in enumerate(classes)
        if (folder / name).is_dir()
        for file in files_in(folder / name, ignored)
    ]


def _flat(layout: _Layout, files: list[str], classes: Sequence[str]) -> list[Item]:
    if not files:
        return []
    if layout.val_labels is None:
        raise UserError(
            f"{layout.val}: {len(files)} images without class folders. Set --val-labels to a file of their classes "
            "(Kaggle's LOC_val_solution.csv, or the devkit's ILSVRC2012_validation_ground_truth.txt with --devkit)"
        )
    if not layout.val_labels.is_file():
        raise UserError(f"--val-labels {layout.val_labels}: no such file")
    ids = read_devkit(layout.devkit)[0] if layout.devkit is not None and layout.ids else None
    labels = read_val_labels(layout.val_labels, files, classes, ids)
    return [Item(labels[file], os.path.join(layout.val, file)) for file in files]


def _names(layout: _Layout, classes: Sequence[str]) -> list[str]:
    """Return the names of the WNIDs ``classes``, or an empty list if they are unknown."""
    if layout.names is not None:
        names = read_names(layout.names)
    elif layout.devkit is not None:
        names = read_devkit(layout.devkit)[1]
    else:
        return []
    if names and (missing := [name for name in classes if name not in names]):
        raise UserError(
            f"{layout.names or layout.devkit}: names are missing for the classes {', '.join(missing[:5])}; add them"
        )
    return [names[name] for name in classes] if names else []


def _check_full(layout: _Layout, classes: list[str], train: list[Item], val: list[Item]) -> None:
    """Raise UserError if the data set is not the complete ImageNet. The message lists all differences."""
    faults = []
    right = official_wnids()
    if right:
        faults += _list("missing classes", sorted(set(right) - set(classes)))
        faults += _list("classes that are not in ImageNet", sorted(set(classes) - set(right)))
    elif len(classes) != CLASSES:
        faults.append(f"{len(classes)} classes instead of {CLASSES}")
    if len(train) != TRAIN:
        faults.append(f"{len(train):,} training images instead of {TRAIN:,}")
        if layout.train_list is not None:
            there = {"/".join(Path(item.path).with_suffix("").parts[-2:]) for item in train}
            listed = (line.split()[0] for line in read_lines(layout.train_list))
            faults += _list("missing files", [f"{name}.JPEG" for name in listed if name not in there])
        counts = Counter(item.label for item in train)
        small = [f"{name} ({counts[n]})" for n, name in enumerate(classes) if counts[n] < _LEAST_OF_CLASS]
        faults += _list(f"classes with fewer than {_LEAST_OF_CLASS} images", small)
    if len(val) != VAL:
        faults.append(f"{len(val):,} validation images instead of {VAL:,}")
        names = {Path(item.path).stem for item in val}
        expected = (f"ILSVRC2012_val_{number:08d}" for number in range(1, VAL + 1))
        faults += _list("missing files", [f"{name}.JPEG" for name in expected if name not in names])
    elif any(count != _VAL_OF_CLASS for count in Counter(item.label for item in val).values()):
        faults.append(f"some classes do not have exactly {_VAL_OF_CLASS} validation images")
    if faults:
        raise UserError(
            f"{layout.train.parent}: not the complete ImageNet: {'; '.join(faults)}. Add the missing files, or use "
            "--expect any"
        )


def _list(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"{title}: {', '.join(names[:5])}{f', ... ({len(names)})' if len(names) > 5 else ''}"]


def official_wnids() -> list[str]:
    """Return the 1000 WNIDs of ILSVRC 2012, sorted. They are read from a file of timm; without it, return []."""
    file = package_file("timm", "data/_info/imagenet_synsets.txt")
    return [] if file is None else sorted(WNID.findall(file.read_text(encoding="utf-8")))


def read_names(path: Path) -> dict[str, str]:
    """Read WNID → name from a file with lines like ``n01440764 tench, Tinca tinca`` (LOC_synset_mapping.txt)."""
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        wnid, _, name = line.partition(" ")
        if not WNID.fullmatch(wnid) or wnid in names:
            raise UserError(
                f"{path}, line {number}: {line[:60]!r}: must be a WNID, a space and a name. WNIDs must not be repeated"
            )
        names[wnid] = name.strip()
    return names


def read_devkit(path: Path) -> tuple[dict[int, str], dict[str, str]]:
    """Read ILSVRC id → WNID, and WNID → name, from the devkit.

    Args:
        path: meta.mat (needs SciPy), a folder that contains meta.mat, or a text file whose line n has the WNID of id n
            (then there are no names).

    Raises:
        UserError: if the file is missing or damaged.
    """
    if path.is_dir():
        found = sorted(path.rglob("meta.mat"))
        if not found:
            raise UserError(f"--devkit {path}: no meta.mat in this folder")
        path = found[0]
    if not path.is_file():
        raise UserError(f"--devkit {path}: no such file")
    if path.suffix != ".mat":
        wnids = [line.split()[0] for line in read_lines(path)]
        _check_wnids(path, wnids)
        return dict(enumerate(wnids, 1)), {}
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{path}: reading it needs SciPy ({error}). Run pip install scipy") from error
    try:
        synsets: Any = loadmat(str(path), squeeze_me=True)["synsets"]
        leaves = [entry for entry in synsets if int(entry["num_children"]) == 0]
        ids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in leaves}
        names = {str(entry["WNID"]): str(entry["words"]) for entry in leaves}
    except Exception as error:  # scipy raises almost anything for damaged files
        raise UserError(
            f"{path}: cannot be read as the meta.mat of the ImageNet devkit ({type(error).__name__}: {error})"
        ) from error
    _check_wnids(path, list(ids.values()))
    return ids, names


def _check_wnids(path: Path, wnids: list[str]) -> None:
    bad = next((wnid for wnid in wnids if not WNID.fullmatch(wnid)), None)
    if bad is not None or len(set(wnids)) != len(wnids) or not wnids:
        what = "no WNIDs" if not wnids else f"{bad!r} is not a WNID" if bad is not None else "a WNID is repeated"
        raise UserError(f"{path}: {what}. Each WNID must be on a line of its own, like n01440764, and only once")


def read_val_labels(
    path: Path, files: Sequence[str], classes: Sequence[str], devkit: Mapping[int, str] | None
) -> dict[str, int]:
    """Read the class indices of validation images.

    Args:
        path: a file with one label per line, in the order of the sorted file names; or with ``name label`` on each
            line; or Kaggle's LOC_val_solution.csv. A label is a WNID or a class index (0, 1, ...).
        files: file names without a folder.
        classes: WNIDs in the order of the class indices.
        devkit: ILSVRC id → WNID. If given, labels that are numbers are ILSVRC ids (1, 2, ...).

    Returns:
        File name → class index, for all ``files``.

    Raises:
        UserError: if labels are missing, unknown or ambiguous.
    """
    rows = _rows(path)
    numbers = {int(label) for _, label in rows if _NUMBER.fullmatch(label)}
    from_one = max(numbers, default=0) == len(classes) and 0 not in numbers
    # ILSVRC ids look like class indices. Without this check, they would silently give wrong labels.
    if numbers and devkit is None and ("ground_truth" in path.name.lower() or from_one):
        raise UserError(
            f"{path}: the numbers are ILSVRC ids of the devkit, whose order differs from the class indices. Set "
            "--devkit to the devkit's meta.mat (or a list of its WNIDs in the order of the ids), or use a file of WNIDs"
        )
    index = {name: number for number, name in enumerate(classes)}
    labels: list[int] = []
    for line, (_, label) in enumerate(rows, 1):
        wnid = devkit.get(int(label), "") if devkit is not None and _NUMBER.fullmatch(label) else label
        number = int(label) if devkit is None and _NUMBER.fullmatch(label) else index.get(wnid, -1)
        if not 0 <= number < len(classes):
            raise UserError(
                f"{path}, line {line}: {label[:40]!r} is not one of the {len(classes)} training classes. {_WANTED}"
            )
        labels.append(number)
    if not any(name for name, _ in rows):
        if len(rows) != len(files):
            raise UserError(f"{path}: {len(rows)} labels for {len(files)} images. {_WANTED}")
        return dict(zip(sorted(files), labels, strict=True))
    known: dict[str, int] = {}
    for (name, _), number in zip(rows, labels, strict=True):
        stem = Path(name).stem
        if stem in known:
            raise UserError(f"{path}: the file name {name!r} is repeated. Remove one of its lines")
        known[stem] = number
    missing = [file for file in files if Path(file).stem not in known]
    if missing:
        raise UserError(f"{path}: {len(missing)} image(s) have no label: {', '.join(sorted(missing)[:5])}")
    return {file: known[Path(file).stem] for file in files}


def _rows(path: Path) -> list[tuple[str, str]]:
    """Return (file name or "", label) of each line."""
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path}: contains no labels. {_WANTED}")
    if lines[0].lower().startswith("imageid,"):  # Kaggle's: ImageId,PredictionString
        lines = [" ".join(line.replace(",", " ").split()[:2]) for line in lines[1:]]
    rows = []
    for number, line in enumerate(lines, 1):
        parts = line.replace(",", " ").split()
        if len(parts) > 2 or len(parts) != len(lines[0].replace(",", " ").split()):
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not valid. {_WANTED}")
        rows.append((parts[0] if len(parts) == 2 else "", parts[-1]))
    return rows
