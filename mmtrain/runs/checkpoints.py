"""The names in the folder ``checkpoints`` of a run: which entries are checkpoints, and what a save left unfinished.

Only exact names count: whatever else lies there (a copy named ``step_00000020.bak``) is never read and never deleted.
"""

from __future__ import annotations

import re
from pathlib import Path

_CHECKPOINT = re.compile(r"step_(\d{8,18})")
_UNFINISHED = re.compile(r"step_\d{8,18}(\.old)?\.partial")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in ``folder`` by their steps, the oldest first. Whether they are whole is not looked at."""
    found = {}
    for path in folder.glob("step_*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.name == checkpoint_name(int(match[1])) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def unfinished_in(folder: Path) -> list[Path]:
    """What an interrupted save, or an interrupted deletion, left in ``folder``."""
    return [path for path in folder.glob("step_*.partial") if _UNFINISHED.fullmatch(path.name)]


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint of the run folder ``run``, 0 without one."""
    return max(checkpoints_in(run / "checkpoints"), default=0)
