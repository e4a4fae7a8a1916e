"""What each rank publishes about itself for the watchdog, and which ranks the others wait for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

#: How many ranks a message names before it only counts.
_NAMED = 8


class Position(NamedTuple):
    """Where the main thread of a rank is. All ranks pass the same positions in the same order: a lower one is behind.

    ``phase_number`` counts the changes of phase within the step. ``beats`` counts the beats within the phase, such as
    the batches of an evaluation, of which ranks may have different numbers.
    """

    step: int
    phase_number: int
    beats: int
    phase: str

    def next(self, step: int, phase: str) -> Position:
        if step != self.step:
            return Position(step, 0, 0, phase)
        return (
            Position(step, self.phase_number + 1, 0, phase)
            if phase != self.phase
            else self._replace(beats=self.beats + 1)
        )

    def __str__(self) -> str:
        return f"step {self.step} ({self.phase})"


class Status(NamedTuple):
    """What a rank tells the others.

    ``who``: host and pid. ``waited``: seconds since its last beat. ``late``: that is more than its timeout.
    ``left``: how it left the watchdog, empty while it has not. ``number``: grows with every publication.
    """

    who: str
    position: Position
    waited: float = 0.0
    late: bool = False
    left: str = ""
    number: int = 0

    def pack(self) -> str:
        """The first byte says whether it is late, so that rank 0 need not parse thousands of these each second."""
        return ("!" if self.late else ".") + json.dumps(self)

    @staticmethod
    def unpack(raw: bytes) -> Status:
        who, position, *rest = json.loads(raw[1:])
        return Status(who, Position(*position), *rest)


def describe_missing(statuses: Mapping[int, Status | None], silent: Mapping[int, float], store_silent: bool) -> str:
    """Name the ranks that the others wait for.

    Args:
        statuses: of all ranks that are known; None for one that never published any.
        silent: seconds since the last sign of life, of the ranks that do not answer.
        store_silent: the store does not answer either. Rank 0 hosts it (or torchrun's agent on the first node).
    """
    found = []
    for rank, status in sorted(statuses.items()):
        if status is None:
            found.append(f"rank {rank} has not been seen at all")
        elif status.left:
            found.append(f"rank {rank} ({status.who}) {status.left}, in {status.position}")
        elif rank in silent:
            detail = f"was last seen in {status.position}, {silent[rank]:.0f} s ago, and does not answer"
            found.append(f"rank {rank} ({status.who}) {detail}{', nor does the store' * (store_silent and rank == 0)}")
    known = {rank: status for rank, status in sorted(statuses.items()) if status is not None}
    if not found:
        farthest = min(status.position[:3] for status in known.values())
        # only the farthest behind: whoever is between waits for them, as the others do
        behind = {rank: status for rank, status in known.items() if status.position[:3] == farthest}
        if len(behind) == len(known):
            return f"no rank is behind: all {len(known)} answer and are in {min(s.position for s in known.values())}"
        for rank, status in behind.items():
            detail = f"answers but is still in {status.position}, for {status.waited:.0f} s"
            found.append(f"rank {rank} ({status.who}) {detail}")
    more = len(found) - _NAMED
    return "; ".join(found[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
