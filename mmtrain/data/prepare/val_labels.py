"""Which class each image of a flat validation folder has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmtrain.data.prepare.synsets import read_lines
from mmtrain.errors import UserError

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
