"""ImageNet's classes: WordNet ids (WNIDs), their names, and the numbers that other files use for them.

A class's index is the place of its WNID in sorted order, as for torchvision and timm. The devkit's ILSVRC ids (1 to
1000) are another order, which only its ``meta.mat`` tells.
"""

from __future__ import annotations

import importlib.util
import re
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
