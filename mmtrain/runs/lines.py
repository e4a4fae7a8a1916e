"""The lines of ``metrics.jsonl`` and ``jobs.jsonl``, without those that cannot be used.

A line may be torn by a kill, or damaged by a disk or a hand. One such line must not hide the others, let alone other
runs: readers leave it out and count it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mmtrain.files import parse_json_line

Line = dict[str, Any]

#: Numbers in a line. A loss may have become infinite or NaN; the others are finite and not negative.
_MEASURED = frozenset({"loss", "lr", "grad_norm", "top1", "top5", "mse", "mae", "samples_per_second"})
_COUNTED = frozenset({"step", "from_step", "samples", "epoch", "time", "step_seconds"})
#: No step, number of samples or time is larger: they are exact in a float, and a date can be made of the time.
_MOST, _LAST_TIME = 2**53, 1e11


class Lines(NamedTuple):
    """``damaged``: how many lines were left out; ``first``: the number of the first of them, from 1."""

    lines: list[Line]
    damaged: int
    first: int | None

    def warning(self, file: Path) -> str | None:
        """A sentence about the lines that were left out; None where there are none."""
        if not self.damaged:
            return None
        return f"{file}: {self.damaged} damaged line(s) left out, the first of them line {self.first}"


def sound_line(text: str) -> Line | None:
    """The object in a line where its kind is text and its numbers are numbers; None for others."""
    line = parse_json_line(text)
    if line is None or not isinstance(line.get("kind"), str):
        return None
    return line if all(_sound(key, value) for key, value in line.items()) else None


def _sound(key: str, value: Any) -> bool:
    if key not in _COUNTED and key not in _MEASURED:
        return not isinstance(value, int) or abs(value) <= 2**63
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if key in _MEASURED:
        return isinstance(value, float) or abs(value) <= _MOST
    return 0 <= value <= (_LAST_TIME if key == "time" else _MOST)


def sound_lines(content: str) -> Lines:
    """The lines of ``content`` that can be used, oldest first. An empty one is no damage, nor one without an end."""
    found: list[Line] = []
    damaged, first = 0, None
    texts = content.splitlines()
    ended = len(texts) if content.endswith("\n") else len(texts) - 1
    for number, text in enumerate(texts, 1):
        line = sound_line(text)
        if line is not None:
            found.append(line)
        elif text.strip() and number <= ended:
            damaged, first = damaged + 1, first or number
    return Lines(found, damaged, first)


def read_lines(file: Path) -> Lines:
    """The lines of ``file`` that can be used; none where there is no such file."""
    try:
        return sound_lines(file.read_text(errors="replace"))
    except FileNotFoundError:
        return Lines([], 0, None)
