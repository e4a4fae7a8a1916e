"""Files of JSON objects, a line each, as a process that may be killed at any time leaves them.

Writing that outlasts a power cut.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def parse_line(text: str) -> dict[str, Any] | None:
    """The object in a line, or None where it is torn or no object."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects in ``file``, oldest first, without torn lines; none where there is no such file."""
    try:
        texts = file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for text in texts if (line := parse_line(text)) is not None]


def sync(path: Path) -> None:
    """Make a file or folder durable; a rename is once its folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
