"""The status that each rank publishes for the watchdog, and the description of ranks that the others wait for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

#: Maximum number of ranks named in a message. Further ranks are counted.
_NAMED = 8


class Position(NamedTuple):
    """Position of the main thread of a rank in training.

    All ranks pass the same positions in the same order, so the rank with the lowest position is behind.

    Attributes:
        step: the current step, from 1.
        phase_number: number of phase changes within the step.
        beats: number of beats within the phase, such as batches of an evaluation. It may differ between ranks.
        phase: name of the current phase.
    """

    step: int
    phase_number: int
    beats: int
    phase: str

    def next(self, step: int, phase: str) -> Position:
        """Return the position after a beat in ``phase`` of ``step``."""
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
    """Status that a rank publishes.

    Attributes:
        who: host and pid.
        position: position of its main thread.
        waited: seconds since its last beat.
        late: ``waited`` exceeds its timeout.
        left: how the rank left the watchdog, empty before that.
        number: counter of publications. It makes every status different, as a sign of life.
    """

    who: str
    position: Position
    waited: float = 0.0
    late: bool = False
    left: str = ""
    number: int = 0

    def pack(self) -> str:
        """Serialise the status. The first byte marks a late rank, so that rank 0 need not parse the JSON."""
        return ("!" if self.late else ".") + json.dumps(self)

    @staticmethod
    def unpack(raw: bytes) -> Status:
        """Parse the result of :meth:`pack`."""
        who, position, *rest = json.loads(raw[1:])
        return Status(who, Position(*position), *rest)


def describe_missing(statuses: Mapping[int, Status | None], silent: Mapping[int, float], store_silent: bool) -> str:
    """Describe the ranks that the others wait for, for an error message.

    Args:
        statuses: status of each known rank, or None for a rank that has never published one.
        silent: seconds since the last sign of life, for each rank that does not respond.
        store_silent: whether the store does not respond either. Rank 0 or torchrun's agent on the first node hosts it.
    """
    found = []
    for rank, status in sorted(statuses.items()):
        if status is None:
            found.append(f"rank {rank} has never responded")
        elif status.left:
            found.append(f"rank {rank} ({status.who}) {status.left}, in {status.position}")
        elif rank in silent:
            detail = f"was last seen in {status.position}, {silent[rank]:.0f} s ago, and does not respond"
            found.append(f"rank {rank} ({status.who}) {detail}{', nor does the store' * (store_silent and rank == 0)}")
    known = {rank: status for rank, status in sorted(statuses.items()) if status is not None}
    if not found:
        farthest = min(status.position[:3] for status in known.values())
        # Name only the ranks with the lowest position. All others wait for them.
        behind = {rank: status for rank, status in known.items() if status.position[:3] == farthest}
        if len(behind) == len(known):
            return f"no rank is behind: all {len(known)} respond and are in {min(s.position for s in known.values())}"
        for rank, status in behind.items():
            detail = f"responds but has been in {status.position} for {status.waited:.0f} s"
            found.append(f"rank {rank} ({status.who}) {detail}")
    more = len(found) - _NAMED
    return "; ".join(found[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
