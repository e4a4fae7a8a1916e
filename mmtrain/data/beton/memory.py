"""Whether a random order over a beton fits this machine's memory."""

from __future__ import annotations

import logging
from pathlib import Path

from mmtrain.data.beton.format import Beton

#: Where Linux tells of free memory, and a container (cgroup v2) of its own limit and use.
_MACHINE, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_log = logging.getLogger("mmtrain")
_told: set[tuple[Path, bool]] = set()


def free_memory() -> int | None:
    """Bytes that can be had without swapping, what is now cached of files included; None where nobody tells."""
    found: list[int] = []
    try:
        lines = dict(line.split(":", 1) for line in _MACHINE.read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        limit = int((_CONTAINER / "memory.max").read_text())  # "max" where there is none
        used = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        found.append(max(0, limit - int(used["anon"])))
    except (OSError, KeyError, ValueError):
        pass
    return min(found) if found else None


def warn_of_thrashing(beton: Beton, os_cache: bool, window: int) -> None:
    """Say once for a file what to set where the pages of a random order will not stay in memory."""
    free = free_memory()
    if free is None or (beton.path, os_cache) in _told:
        return
    blocks = max(1, len(beton.block_sizes))
    # Two windows are at hand where one ends and the next begins.
    windows = min(beton.stored, 2 * window * beton.stored // blocks)
    if os_cache and beton.stored > free:
        cure = (
            f"set data.os_cache=false, which keeps the pages of two shuffle windows ({_gb(windows)} for each rank), or "
            "make the file smaller (mmtrain data prepare ffcv --max-resolution 500 --write-mode jpg)"
        )
        what = f"{_gb(beton.stored)} of images in a random order, but {_gb(free)} of memory"
    elif not os_cache and windows > free:
        cure = f"set data.shuffle_window below {window}"
        what = f"two shuffle windows of {window} blocks are {_gb(windows)} for each rank, but {_gb(free)} of memory"
    else:
        return
    _told.add((beton.path, os_cache))
    _log.warning("%s: %s: reading will wait for the disk again and again; %s", beton.path, what, cure)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
