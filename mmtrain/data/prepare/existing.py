"""What is at --out already: the dataset that was asked for, or another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError


def existing_meta(
    out: Path, source: str, settings: Mapping[str, Any], made_as: Mapping[str, Any], *, force: bool
) -> dict[str, Any] | None:
    """The meta.json of ``out`` if it was made from ``source`` with these settings; None without one, or by ``force``.

    ``made_as``: more of its keys, and what they must be (the format). Raises UserError with all that differs.
    """
    file = out / "meta.json"
    if force or not file.is_file():
        return None
    try:
        meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = {**{key: meta.get(key) for key in made_as}, "source": meta["source"], **meta["settings"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not the meta.json of a prepared dataset ({error}); give --force or another --out"
        ) from error
    wanted = {"source": source, **settings, **made_as}
    different = [f"{key} {found.get(key)!r}, not {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise UserError(f"{out}: holds a dataset made with {'; '.join(different)}; give --force or another --out")
    return meta
