"""A run as the report shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtrain.runs.reader import RunRecord
from mmtrain.runs.status import Status

#: One colour a run, as far as they go.
COLORS = ("#2e6f95", "#d1495b", "#3a8f5c", "#c9852c", "#6c5b9e", "#5b6770", "#b0508f", "#1c9aa0")


@dataclass(frozen=True)
class Shown:
    """A run, its name in the report, and its place there."""

    name: str
    facts: RunRecord
    status: Status
    place: int

    @property
    def color(self) -> str:
        return COLORS[self.place % len(COLORS)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as much more of it as tells it from the others."""
    whole = [path.resolve().parts for path in paths]
    longest = max((len(parts) for parts in whole), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
