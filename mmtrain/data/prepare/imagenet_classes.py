"""ImageNet's classes: WordNet ids (WNIDs), their names, and the classes of the images of a flat validation folder.

A class's index is the place of its WNID in sorted order, as for torchvision and timm. The devkit's ILSVRC ids (1 to
1000) are another order, which only its ``meta.mat`` tells.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError

WNID = re.compile(r"n\d{8}")
_NOT_META = "not the meta.mat of the ImageNet devkit"


def official_wnids() -> list[str]:
    """The 1000 WNIDs of ILSVRC 2012, sorted (from timm's files; its code is not imported). Empty if they are gone."""
    spec = importlib.util.find_spec("timm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "data" / "_info" / "imagenet_synsets.txt"
        if file.is_file():
            return sorted(WNID.findall(file.read_text(encoding="utf-8")))
    return []


def read_names(path: Path) -> dict[str, str]:
    """WNID → name from a file with lines such as ``n01440764 tench, Tinca tinca`` (LOC_synset_mapping.txt)."""
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        wnid, _, name = line.partition(" ")
        if not WNID.fullmatch(wnid) or wnid in names:
            raise UserError(f"{path}, line {number}: {line[:60]!r}: wanted is a WNID, once, a space and its name")
        names[wnid] = name.strip()
    return names


def read_devkit(path: Path) -> tuple[dict[int, str], dict[str, str]]:
    """ILSVRC id → WNID, and WNID → name, of the devkit.

    ``path``: meta.mat (needs scipy), a folder that holds one, or a text file with the WNID of id 1 in its first line,
    that of id 2 in its second and so on.
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
        raise UserError(f"{path}: needs scipy: pip install scipy ({error})") from error
    try:
        synsets: Any = loadmat(str(path), squeeze_me=True)["synsets"]
        leaves = [entry for entry in synsets if int(entry["num_children"]) == 0]
        ids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in leaves}
        names = {str(entry["WNID"]): str(entry["words"]) for entry in leaves}
    except Exception as error:  # scipy raises almost anything for damaged files
        raise UserError(f"{path}: {_NOT_META} ({type(error).__name__}: {error})") from error
    _check_wnids(path, list(ids.values()))
    return ids, names


def _check_wnids(path: Path, wnids: list[str]) -> None:
    bad = next((wnid for wnid in wnids if not WNID.fullmatch(wnid)), None)
    if bad is not None or len(set(wnids)) != len(wnids) or not wnids:
        what = "no WNIDs" if not wnids else f"{bad!r} is no WNID" if bad is not None else "a WNID is there twice"
        raise UserError(f"{path}: {what}; wanted are lines such as n01440764, each once")


def read_lines(path: Path) -> list[str]:
    """Lines that are not empty, without spaces around them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


_WANTED = "wanted is a WNID or a class index in each line, in the order of the file names, or a name and one of them"


def read_val_labels(
    path: Path, files: Sequence[str], classes: Sequence[str], devkit: Mapping[int, str] | None
) -> dict[str, int]:
    """File name → class index for all of ``files`` (names without a folder).

    ``path`` holds a label in each line, in the order of the sorted names; or ``name label`` in each; or it is Kaggle's
    LOC_val_solution.csv. A label is a WNID or the class's index (0, 1, ...); with ``devkit`` (ILSVRC id → WNID) numbers
    are the ids of the devkit (1, 2, ...). Raises UserError for labels that are missing, unknown or ambiguous.
    """
    rows = _rows(path)
    numbers = {label for _, label in rows if label.isdigit()}
    if numbers and devkit is None:
        _not_ids(path, numbers, len(classes))
    index = {name: number for number, name in enumerate(classes)}
    labels: list[int] = []
    for line, (_, label) in enumerate(rows, 1):
        wnid = devkit.get(int(label), "") if devkit is not None and label.isdigit() else label
        number = int(label) if devkit is None and label.isdigit() else index.get(wnid, -1)
        if not 0 <= number < len(classes):
            raise UserError(
                f"{path}, line {line}: {label[:40]!r} is none of the {len(classes)} classes that train has; {_WANTED}"
            )
        labels.append(number)
    if not any(name for name, _ in rows):
        if len(rows) != len(files):
            raise UserError(f"{path}: {len(rows)} labels for {len(files)} images; {_WANTED}")
        return dict(zip(sorted(files), labels, strict=True))
    return _by_name(path, [name for name, _ in rows], labels, files)


def _rows(path: Path) -> list[tuple[str, str]]:
    """(name or "", label) of each line."""
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path}: holds no labels; {_WANTED}")
    if lines[0].lower().startswith("imageid,"):  # Kaggle's: ImageId,PredictionString
        lines = [" ".join(line.replace(",", " ").split()[:2]) for line in lines[1:]]
    rows = []
    for number, line in enumerate(lines, 1):
        parts = line.replace(",", " ").split()
        if len(parts) > 2 or len(parts) != len(lines[0].replace(",", " ").split()):
            raise UserError(f"{path}, line {number}: {line[:60]!r}; {_WANTED}")
        rows.append((parts[0] if len(parts) == 2 else "", parts[-1]))
    return rows


def _not_ids(path: Path, numbers: set[str], classes: int) -> None:
    """ILSVRC ids look like class indices, and would silently give wrong labels."""
    values = {int(number) for number in numbers}
    if "ground_truth" in path.name.lower() or (max(values) == classes and 0 not in values):
        raise UserError(
            f"{path}: these numbers are the devkit's ILSVRC ids, whose order is not that of the class indices: give "
            "--devkit with the devkit's meta.mat (or a list of its WNIDs, in the order of the ids), or a file of WNIDs"
        )


def _by_name(path: Path, names: list[str], labels: list[int], files: Sequence[str]) -> dict[str, int]:
    known: dict[str, int] = {}
    for name, label in zip(names, labels, strict=True):
        stem = Path(name).name
        stem = stem if Path(stem).suffix == "" else Path(stem).stem
        if stem in known:
            raise UserError(f"{path}: {name!r} is there twice")
        known[stem] = label
    missing = [file for file in files if Path(file).stem not in known]
    if missing:
        raise UserError(f"{path}: no label for {len(missing)} image(s): {', '.join(sorted(missing)[:5])}")
    return {file: known[Path(file).stem] for file in files}
