"""A run that hangs ends with the names of the missing ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mmtrain.parallel.rank_status import Position, Status, describe_missing
from mmtrain.parallel.ranks import Ranks, collective_timeout, is_collective_error
from mmtrain.parallel.watchdog import EXIT_HANG, Watchdog

ROOT = Path(__file__).resolve().parents[2]

#: Seconds for an end that takes about 3 on an idle machine.
LIMIT = 15

#: A small train loop. Each rank prints "ready" at step 50, when all have published; what goes wrong is an argument.
LOOP = """
import logging, os, sys, time
from pathlib import Path
import torch
from mmtrain.parallel.ranks import (
    enable_flight_recorder, init_distributed, is_collective_error, set_collective_timeout
)
from mmtrain.parallel.watchdog import Watchdog

folder, what, start, step_timeout = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
logging.basicConfig(level=logging.INFO, format="%(message)s")
enable_flight_recorder()
with init_distributed("cpu") as ranks, Watchdog(ranks, start, step_timeout, folder) as watch:
    try:
        for step in range(70 if what == "finish" else 100000):
            watch.beat(step, "data")
            if what == "sleep" and ranks.rank == 1 and step == 60:
                time.sleep(1000)
            if what == "raise" and ranks.rank == 1 and step == 60:
                raise ValueError("sample 17 is broken")
            if what == "slow start" and ranks.rank == 1 and step == 0:
                time.sleep(3 * step_timeout)
            time.sleep(0.01)
            watch.beat(step, "agree")
            ranks.any(False)
            if step == 0:
                ranks.barrier()
                if what == "timeout":
                    set_collective_timeout(1.0)
                else:
                    watch.first_step_done()
            if step == 50:
                print("ready", flush=True)
                if what == "timeout" and ranks.rank == 1:
                    time.sleep(1000)
    except RuntimeError as error:
        if not is_collective_error(error):
            raise
        print("described:", watch.describe(), flush=True)
        raise
import threading
print("threads left:", [t.name for t in threading.enumerate() if "watchdog" in t.name], flush=True)
"""


class Run:
    """The loop above, on ``world`` ranks."""

    def __init__(self, folder: Path, what: str, world: int, start: float = 60.0, step: float = 2.0) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.folder = folder
        shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", LOOP, str(folder), what, str(start), str(step)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=(folder / f"{rank}.err").open("w"),
                text=True,
            )
            for rank in range(world)
        ]

    def ready(self) -> float:
        """Wait for the first step of every rank; returns the time."""
        for rank in self.ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "ready\n", self.said(0)
        return time.monotonic()

    def name(self, rank: int) -> str:
        return f"rank {rank} ({socket.gethostname()}, pid {self.ranks[rank].pid})"

    def said(self, rank: int, seconds: float = 20.0) -> str:
        """All that ``rank`` printed until its end."""
        out, _ = self.ranks[rank].communicate(timeout=seconds)
        return out + (self.folder / f"{rank}.err").read_text()


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def begin(what: str, world: int, **timeouts: float) -> Run:
        runs.append(Run(tmp_path, what, world, **timeouts))
        return runs[-1]

    yield begin
    for process in [process for run in runs for process in run.ranks]:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_others(start: Start) -> None:
    run = start("train", 3)
    begin = run.ready()
    run.ranks[1].send_signal(signal.SIGSTOP)
    said = [run.said(rank) for rank in (0, 2)]
    assert time.monotonic() - begin < LIMIT
    for rank, text in zip((0, 2), said, strict=True):
        assert run.ranks[rank].returncode == EXIT_HANG, text
        assert text.count("has waited") == 1
        assert f": {run.name(1)} was last seen in step " in text
        assert " s ago, and does not respond. The run ends" in text
        assert run.name(0) not in text
        assert run.name(2) not in text
        stacks = (run.folder / f"hang_rank{rank:05d}.txt").read_text()
        assert "in all_reduce" in stacks
        recorded = json.loads((run.folder / f"flight_gloo_rank_{rank}.json").read_text())
        assert recorded["entries"][-1]["profiling_name"] == "gloo:all_reduce"
        numbers = recorded["pg_status"]["0"]
        assert int(numbers["last_enqueued_collective"]) == int(numbers["last_completed_collective"]) + 1


@pytest.mark.slow
def test_a_stopped_host_of_the_store_is_named(start: Start) -> None:
    run = start("train", 3)
    begin = run.ready()
    run.ranks[0].send_signal(signal.SIGSTOP)
    said = [run.said(rank) for rank in (1, 2)]
    assert time.monotonic() - begin < LIMIT
    for rank, text in enumerate(said, start=1):
        assert run.ranks[rank].returncode == EXIT_HANG, text
        assert f": {run.name(0)} was last seen in step " in text
        assert "and does not respond, nor does the store" in text
        assert all(run.name(other) not in text for other in (1, 2))


@pytest.mark.slow
def test_a_killed_host_of_the_store_is_described_from_the_error_of_the_collective(start: Start) -> None:
    run = start("train", 2)
    begin = run.ready()
    run.ranks[0].kill()
    text = run.said(1)
    assert time.monotonic() - begin < LIMIT
    assert run.ranks[1].returncode not in (0, None)
    assert f"described: {run.name(0)} was last seen in step " in text


@pytest.mark.slow
def test_of_three_the_killed_one_is_described_by_both(start: Start) -> None:
    run = start("train", 3)
    run.ready()
    run.ranks[1].kill()
    for rank in (0, 2):
        text = run.said(rank)
        assert run.ranks[rank].returncode not in (0, None)
        assert f"{run.name(1)} was last seen in step " in text


@pytest.mark.slow
def test_a_rank_that_raises_is_described_with_its_error(start: Start) -> None:
    run = start("raise", 2, step=5.0)
    run.ready()
    text = run.said(0)
    assert run.ranks[0].returncode == 1
    assert f"{run.name(1)} left after ValueError: sample 17 is broken, in step 60 (data)" in text
    assert "ValueError: sample 17 is broken" in run.said(1)
    assert run.ranks[1].returncode == 1


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_by_all_and_shows_where(start: Start) -> None:
    run = start("sleep", 3)
    begin = run.ready()
    for rank, text in enumerate([run.said(rank) for rank in range(3)]):
        assert run.ranks[rank].returncode == EXIT_HANG, text
        assert f": {run.name(1)} responds but has been in step 60 (data) for " in text
        assert "s in step 60 (agree) (the timeout is 2 s)" in text
    assert time.monotonic() - begin < LIMIT
    assert "all_reduce" not in (run.folder / "hang_rank00001.txt").read_text()


@pytest.mark.slow
def test_the_start_may_take_longer_than_a_step(start: Start) -> None:
    run = start("slow start", 2, start=30.0, step=0.8)
    run.ready()
    # and after the first step the short timeout counts
    begin = time.monotonic()
    run.ranks[1].send_signal(signal.SIGSTOP)
    assert f"(the timeout is 1 s): {run.name(1)} was last seen" in run.said(0)
    assert run.ranks[0].returncode == EXIT_HANG
    assert time.monotonic() - begin < LIMIT


@pytest.mark.slow
def test_the_start_does_not_take_for_ever(start: Start) -> None:
    run = start("slow start", 2, start=1.0, step=60.0)
    text = run.said(0)
    assert run.ranks[0].returncode == EXIT_HANG
    assert f"in step 0 (agree) (the timeout is 1 s): {run.name(1)} responds but has been in step 0 (data)" in text


@pytest.mark.slow
def test_a_run_that_is_suspended_and_resumed_goes_on(start: Start) -> None:
    """As Slurm does with a job that has to make room: all ranks are stopped for longer than the timeout."""
    run = start("train", 2, step=1.0)
    run.ready()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in run.ranks:
            process.send_signal(number)
        time.sleep(2.0)
    assert [process.poll() for process in run.ranks] == [None, None], run.said(0)


@pytest.mark.slow
def test_a_normal_end_is_silent(start: Start) -> None:
    run = start("finish", 3)
    begin = run.ready()
    for rank in range(3):
        assert run.said(rank) == "threads left: []\n"
        assert run.ranks[rank].returncode == 0
    assert time.monotonic() - begin < LIMIT
    assert not list(run.folder.glob("hang*"))


@pytest.mark.slow
def test_the_timeout_of_collectives_can_be_shortened(start: Start) -> None:
    run = start("timeout", 2, start=60.0)
    begin = run.ready()
    text = run.said(0)
    assert "Timed out waiting 1000ms" in text
    assert "described: " in text
    assert time.monotonic() - begin < LIMIT


def test_beats_cost_nothing(tmp_path: Path) -> None:
    with Watchdog(Ranks(0, 1, torch.device("cpu")), 60, 60, tmp_path) as watch:
        begin = time.thread_time()
        for step in range(10_000):
            watch.beat(step, "data")
            watch.beat(step, "forward")
        assert (time.thread_time() - begin) / 20_000 < 20e-6
        assert watch.describe() == "there is no other rank"


def status(step: int, nth: int, again: int = 0, left: str = "", waited: float = 9.0) -> Status:
    return Status("host", Position(step, nth, again, ["data", "agree"][nth]), waited, left=left)


def test_only_the_farthest_behind_are_missing() -> None:
    statuses = {0: status(4, 1), 1: status(3, 0), 2: status(3, 1), 3: status(3, 0)}
    assert describe_missing(statuses, {}, False) == (
        "rank 1 (host) responds but has been in step 3 (data) for 9 s;"
        " rank 3 (host) responds but has been in step 3 (data) for 9 s"
    )


def test_who_is_silent_or_gone_explains_who_is_behind() -> None:
    statuses = {0: status(4, 1), 1: status(3, 0), 2: status(4, 1), 3: None, 4: status(4, 0, left="has finished")}
    found = describe_missing(statuses, {2: 7.0}, False)
    assert "rank 1" not in found
    assert found.split("; ") == [
        "rank 2 (host) was last seen in step 4 (agree), 7 s ago, and does not respond",
        "rank 3 has never responded",
        "rank 4 (host) has finished, in step 4 (data)",
    ]


def test_nobody_is_missing() -> None:
    found = describe_missing({0: status(4, 1), 1: status(4, 1)}, {}, False)
    assert found == "no rank is behind: all 2 respond and are in step 4 (agree)"


def test_batches_within_a_phase_decide_last() -> None:
    found = describe_missing({0: status(4, 1, again=6), 1: status(4, 1, again=2), 2: status(4, 1, again=7)}, {}, False)
    assert found.startswith("rank 1 (host) responds")
    assert "rank 0" not in found


def test_many_missing_are_counted() -> None:
    found = describe_missing({rank: status(4, 0) for rank in range(100)} | {100: status(4, 1)}, {}, False)
    assert found.endswith("; and 92 more")


def test_places_follow_the_beats() -> None:
    place = Position(0, 0, 0, "start")
    for step, phase in [(7, "data"), (7, "forward"), (7, "evaluate"), (7, "evaluate")]:
        last, place = place, place.next(step, phase)
        assert place > last
    assert place == Position(7, 2, 1, "evaluate")


def test_a_status_survives_its_journey() -> None:
    one = Status("host, pid 3", Position(1, 2, 3, "save"), 4.5, True, "left after É", 6)
    assert Status.unpack(one.pack().encode()) == one
    assert one.pack()[0] == "!"


def test_the_watchdog_speaks_before_the_collective() -> None:
    assert all(collective_timeout(seconds) > seconds + 20 for seconds in (0.5, 10, 3600))
    assert not is_collective_error(RuntimeError("shape mismatch"))
    assert is_collective_error(RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"))
    assert is_collective_error(torch.distributed.DistNetworkError("Connection reset by peer"))
