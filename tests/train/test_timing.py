"""The time of a step, split: the parts add up, an inner phase is not the outer's, and waiting for others shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from processes import in_processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmtrain.parallel.ranks import Ranks
from mmtrain.train.timing import PHASES, CudaClock, StepTimer, Timings, exposed_reduction

CPU = torch.device("cpu")


class HandClock:
    """Moves only when told to, and counts how often it is read, which on a GPU is a synchronisation."""

    def __init__(self) -> None:
        self.time, self.reads = 0.0, 0

    def now(self) -> float:
        return self.time

    def gaps(self, marks: list[float]) -> list[float]:
        self.reads += 1
        return [after - before for before, after in pairwise(marks)]


def test_the_parts_add_up_and_an_inner_phase_is_not_the_outers() -> None:
    clock = HandClock()
    timer = StepTimer(CPU, clock)
    for _ in range(2):
        with timer.phase("data"):
            clock.time += 1
        clock.time += 0.5
        with timer.phase("backward"):
            clock.time += 2
            with timer.phase("communication"):
                clock.time += 4
            clock.time += 8
        timer.end_step()
    with timer.paused():
        clock.time += 100
    assert clock.reads == 0, "a step must not wait for the GPU"
    timings = timer.window()
    assert clock.reads == 1
    assert timings == Timings(2, 15.5, data=1, forward=0, backward=10, optimizer=0, communication=4, other=0.5)
    assert timings.busy() == 11.5
    assert timings.busy(gathers=True) == 1.5
    assert timings.speed(31, 2) == {"samples_per_second": 2, "samples_per_second_per_rank": 1}
    assert timings.line()["step_seconds"] == 15.5
    assert timings.line()["backward_seconds"] == 10


def test_a_window_begins_anew() -> None:
    clock = HandClock()
    timer = StepTimer(CPU, clock)
    clock.time += 3
    timer.end_step()
    timer.window()
    with timer.phase("forward"):
        clock.time += 5
    timer.end_step()
    timings = timer.window()
    assert (timings.steps, timings.forward, timings.other) == (1, 5, 0)
    assert timer.window().total == 0


def test_an_error_in_a_phase_closes_it() -> None:
    clock = HandClock()
    timer = StepTimer(CPU, clock)
    with pytest.raises(RuntimeError), timer.phase("forward"), timer.phase("communication"):
        raise RuntimeError
    clock.time += 1
    timer.end_step()
    assert timer.window().other == 1


def test_a_window_that_nobody_asks_for_does_not_grow() -> None:
    clock = HandClock()
    timer = StepTimer(CPU, clock)
    for _ in range(5000):
        with timer.phase("forward"):
            clock.time += 1
        timer.end_step()
    assert len(timer._marks) < 5000
    timings = timer.window()
    assert (timings.steps, timings.forward) == (5000, 1)


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer"):
        StepTimer(CPU).phase("optimiser")


def test_the_timer_costs_microseconds() -> None:
    """Five phases a step. About 6 us on a busy core; 20 us are allowed."""
    timer = StepTimer(CPU)

    def steps(count: int) -> float:
        begin = time.thread_time()
        for _ in range(count):
            for name in PHASES:
                with timer.phase(name):
                    pass
            timer.end_step()
        timer.window()
        return (time.thread_time() - begin) / count

    assert min(steps(200) for _ in range(20)) < 20e-6


def test_alone_nothing_is_waited_for_and_gradients_are_the_same() -> None:
    model, timer = nn.Linear(4, 1), StepTimer(CPU)
    x = torch.ones(3, 4)
    loss = model(x).sum()
    with timer.phase("backward"), exposed_reduction(loss, timer):
        time.sleep(0.02)
        loss.backward()
    timer.end_step()
    timings = timer.window()
    assert timings.backward > 0.02
    assert timings.communication < 0.01
    assert torch.equal(model.weight.grad, x.sum(0, keepdim=True))  # type: ignore[arg-type]


def test_a_backward_pass_that_fails_leaves_no_phase_open() -> None:
    timer = StepTimer(CPU)
    weight = torch.ones(1, requires_grad=True)
    middle = weight * 2
    middle.register_hook(lambda grad: 1 / 0)
    loss = middle.sum()
    with pytest.raises(ZeroDivisionError), timer.phase("backward"), exposed_reduction(loss, timer):
        loss.backward()
    assert timer._open == []


class MadeUpEvent:
    """An event of a GPU that is at ``gpu`` seconds; it cannot be read before someone synchronised."""

    gpu, made, waits = 0.0, 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        MadeUpEvent.made += 1

    def record(self, stream: object) -> None:
        self.time = MadeUpEvent.gpu

    def synchronize(self) -> None:
        MadeUpEvent.waits += 1

    def elapsed_time(self, after: MadeUpEvent) -> float:
        assert MadeUpEvent.waits, "read before the GPU was there"
        return 1000 * (after.time - self.time)


def test_on_a_gpu_events_are_read_once_a_window_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", MadeUpEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    timer = StepTimer(torch.device("cuda", 0))
    for window in range(1, 21):
        for _ in range(3):
            with timer.phase("forward"):
                MadeUpEvent.gpu += 2
            MadeUpEvent.gpu += 1
            timer.end_step()
        assert MadeUpEvent.waits == window - 1
        timings = timer.window()
        assert (timings.forward, timings.other, timings.steps) == (pytest.approx(2), pytest.approx(1), 3)
    assert MadeUpEvent.made < 40


# ------------------------------------------------------------------ several processes

_DELAY, _STEPS = 0.15, 6


class Delayed(nn.Module):
    """Rank 1 is slow in its forward pass."""

    def __init__(self, delay: float) -> None:
        super().__init__()
        self.delay = delay
        self.layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay)
        return self.layers(x)


def _steps(model: nn.Module) -> Timings:
    timer, x = StepTimer(CPU), torch.ones(8, 32)
    for step in range(_STEPS):
        if step == 1:  # the first one sets up
            timer.window()
        with timer.phase("forward"):
            loss = model(x).square().mean()
        with timer.phase("backward"), exposed_reduction(loss, timer):
            loss.backward()
        timer.end_step()
    return timer.window()


def _sharded(model: Delayed) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


Both = dict[str, tuple[Timings, Timings]]


def both(ranks: Ranks) -> Both:
    """Under DDP and under FSDP2: without a delay, and with one on rank 1."""
    wraps: dict[str, Callable[[Delayed], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp": _sharded}
    delays = (0.0, _DELAY * ranks.rank)
    return {name: (_steps(wrap(Delayed(delays[0]))), _steps(wrap(Delayed(delays[1])))) for name, wrap in wraps.items()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Both]:
    return in_processes(both, 2, tmp_path_factory.mktemp("timing"))


@pytest.mark.slow
@pytest.mark.timed
def test_ddp_the_wait_for_a_slow_rank_is_communication(measured: list[Both]) -> None:
    (even, waiting), (_, slow) = (rank["ddp"] for rank in measured)
    assert waiting.communication - even.communication == pytest.approx(_DELAY, rel=0.25)
    assert waiting.backward < _DELAY / 3
    assert slow.forward == pytest.approx(_DELAY, rel=0.25)
    assert slow.communication < _DELAY / 3
    assert slow.busy() > 3 * waiting.busy()
    assert waiting.total == pytest.approx(slow.total, rel=0.1)


@pytest.mark.slow
@pytest.mark.timed
def test_fsdp_on_a_cpu_waits_where_it_gathers(measured: list[Both]) -> None:
    """The documented limit: a gather of FSDP2 waits inside the forward or backward pass, and is counted there."""
    (even, waiting), (_, slow) = (rank["fsdp"] for rank in measured)
    assert waiting.total - even.total == pytest.approx(_DELAY, rel=0.3)
    assert waiting.forward == pytest.approx(_DELAY, rel=0.3)
    assert waiting.communication < _DELAY / 3
    assert slow.forward > 0.8 * _DELAY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_work_counts_where_it_was_queued_and_no_step_waits() -> None:
    timer = StepTimer(torch.device("cuda", 0))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with timer.phase("forward"):
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
    with timer.phase("optimizer"):
        pass
    timer.end_step()
    assert time.perf_counter() - begin < 0.04
    timings = timer.window()
    assert timings.forward > 0.05
    assert timings.optimizer < 0.01


def test_the_clock_of_a_gpu_reads_events_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Event] = []

    class Event:
        """Stands for a CUDA event: the n-th record is at n² ms."""

        count = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)

        def record(self, stream: str) -> None:
            assert stream == "the stream"
            Event.count += 1
            self.at = Event.count**2

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    clock = CudaClock(torch.device("cuda"))
    assert clock.gaps([clock.now() for _ in range(3)]) == pytest.approx([0.003, 0.005])
    assert clock.gaps([clock.now() for _ in range(4)]) == pytest.approx([0.009, 0.011, 0.013])
    assert len(made) == 4  # events are used again
