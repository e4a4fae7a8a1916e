"""The runs that the tests look at: each made once, by the gang of its size, and kept for the session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from mmtrain.config import RunConfig
from tests.parallel.cases import HALF, WORLDS, Case
from tests.parallel.gang import Gang
from tests.parallel.jobs import resumed, trained

_SMALL = ("config.yaml", "assets.json", "code.json", "metrics.jsonl")


class Runs:
    """One gang and one queue a world size; the queues are worked off side by side."""

    def __init__(self, folder: Path, bases: dict[str, RunConfig]) -> None:
        self.folder, self.bases = folder, bases
        self._gangs = {world: Gang(world, folder / f"gang_{world}") for world in WORLDS}
        # who waits for a gang with the door in hand comes before the rest of its queue
        self._doors, self._rooms = ({world: Lock() for world in WORLDS} for _ in range(2))
        self._queues = {world: ThreadPoolExecutor(1) for world in WORLDS}
        self._made: dict[Case, Future[Path]] = {}

    def begin(self, case: Case) -> None:
        """Queue ``case``, after the run that it starts from: so no queue ever waits for what stands behind it."""
        if case.start is not None:
            self.begin(case.start)
        if case not in self._made:
            self._made[case] = self._queues[case.world].submit(self._make, case)

    def of(self, case: Case) -> Path:
        """The folder of the finished run."""
        self.begin(case)
        return self._made[case].result()

    def do(self, job: Callable[..., Any], case: Case, name: str) -> tuple[list[Any], Path]:
        """Run a job of one's own on ``case`` in a new folder; returns what each rank gave, and the folder."""
        if case.start is not None:
            self.of(case.start)
        folder = self.folder / f"{case}-{name}"
        with self._doors[case.world], self._rooms[case.world]:
            return self._run(job, case, folder), folder

    def stop(self) -> None:
        for queue in self._queues.values():
            queue.shutdown(wait=False, cancel_futures=True)
        for gang in self._gangs.values():
            gang.stop()

    def _make(self, case: Case) -> Path:
        folder = self.folder / str(case)
        with self._doors[case.world]:
            pass
        with self._rooms[case.world]:
            self._run(trained if case.start is None else resumed, case, folder)
        return folder

    def _run(self, job: Callable[..., Any], case: Case, folder: Path) -> list[Any]:
        if case.start is not None:
            _cut(self._made[case.start].result(), folder)
        return self._gangs[case.world].run(job, case.configure(self.bases[case.model]), folder)


def _cut(whole: Path, folder: Path) -> None:
    """Copy the run ``whole`` as it stood after step ``HALF``."""
    checkpoint = f"checkpoints/step_{HALF:08d}"
    shutil.copytree(whole / checkpoint, folder / checkpoint)
    for name in _SMALL:
        shutil.copyfile(whole / name, folder / name)


def after(start: Case, strategy: str, world: int) -> Case:
    """``start`` gone on with under another strategy."""
    return replace(start, strategy=strategy, world=world, start=start)
