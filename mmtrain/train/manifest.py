"""The manifest of a checkpoint: size and SHA-256 of every file, written last and verified before a load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmtrain.durable import sync

MANIFEST = "manifest.json"

Entries = dict[str, dict[str, Any]]


def entries_of(paths: Iterable[Path]) -> Entries:
    """Size and digest of each of ``paths``, by name."""
    return {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in paths}


def write_manifest(folder: Path, entries: Entries) -> None:
    """Write the manifest, durably."""
    path = folder / MANIFEST
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1))
    sync(path)
    sync(folder)


def verify(folder: Path, share: int = 0, of: int = 1) -> str | None:
    """What is wrong with the checkpoint in ``folder``, or None.

    Every ``of``-th file is hashed, from number ``share`` on, so that ranks can divide the work; presence and size are
    looked at for all.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for number, (name, entry) in enumerate(manifest.items()):
            file = folder / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
            if number % of == share and _digest(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
