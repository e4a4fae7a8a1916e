"""What a line of metrics tells of the machine and the model: speed, utilisation, memory, stragglers, averaging.

The places where a step spends its time are in ``timing.py``, its operations and the peaks of GPUs in ``flops.py``.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mmtrain.config import RunConfig
from mmtrain.log import logger
from mmtrain.models.averaging import MixerStack, WeightedAverage
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import Strategy, to_local
from mmtrain.tasks import Task
from mmtrain.train.flops import Utilization
from mmtrain.train.timing import StepTimer

#: The families of the averaging's weights, by (is the consumer a channel mixer, is the source one).
_FAMILIES = {(False, False): "alpha", (False, True): "beta", (True, False): "theta", (True, True): "gamma"}
#: A rank that takes so many times the median is worth a warning, at most once in so many seconds.
_SLOW, _WARN_EVERY = 1.3, 600.0


def memory_peak(device: torch.device) -> float:
    """Peak memory so far, in GiB: what torch allocated on a GPU, the resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss, which a process inherits from the one that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20  # KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def averaging_norms(model: nn.Module) -> dict[str, float]:
    """How far the weighted averaging has moved from a residual stream: by family, 0 at the start.

    The root mean square, over all stacks, of the distance of a family's weights from what they start at: 1, and 0 for
    the second copy of a stack's input. ``alpha`` and ``beta`` weigh token and channel outputs in the input of a token
    mixer, ``theta`` and ``gamma`` in that of a channel mixer; of the input's two copies the first is the token one.
    ``out``: all weights of the stacks' outputs. A family without weights is left out; all are without averaging.

    With sharded parameters (FSDP2) it is a collective of one reduction, which every rank must call.

    Raises:
        ValueError: for a parameter that is neither whole nor a DTensor: gather it first (ZeRO-3).
    """
    parameters: list[Tensor] = []
    families: list[list[str]] = []  # of each element of each parameter
    for stack in model.modules():
        if not isinstance(stack, MixerStack):
            continue
        channel = [getattr(mixer, "mixes", "") == "channels" for mixer in stack.mixers]
        for i, average in enumerate(cast(Iterable[WeightedAverage], stack.averages)):
            parameters += [average.weight, average.input_copy]
            # the first copy of the stack's input is a token one, the second a channel one
            sources = [False, *channel[:i], True]
            found = [_FAMILIES[channel[i], source] if i < len(channel) else "out" for source in sources]
            families += [found[:-1], found[-1:]]
    if not parameters:
        return {}
    squares: dict[str, list[float]] = {family: [] for family in (*_FAMILIES.values(), "out")}
    for i, values in enumerate(_elements(parameters, [len(labels) for labels in families])):
        start = float(i % 2 == 0)  # of a weight, or of an input copy
        for family, value in zip(families[i], values, strict=True):
            squares[family].append((value - start) ** 2)
    return {family: (sum(found) / len(found)) ** 0.5 for family, found in squares.items() if found}


def _elements(parameters: list[Tensor], sizes: list[int]) -> list[list[float]]:
    """The elements of each one-dimensional parameter, of ``sizes`` elements, put together from all ranks.

    Every rank writes what it holds into a vector of all elements and counts it: the sum of the vectors over the sum of
    the counts is right for any mesh, sharded or replicated, with one reduction for hundreds of tiny parameters.
    """
    parts, index, begin = [], [], 0
    for parameter, size in zip(parameters, sizes, strict=True):
        if parameter.numel() != size:
            raise ValueError(f"a parameter of the averaging holds {parameter.numel()} elements of {size}: gather it")
        first = begin
        if isinstance(parameter, DTensor):
            layout = parameter.shape, parameter.device_mesh, parameter.placements
            first += compute_local_shape_and_global_offset(*layout)[1][0]
        parts.append(to_local(parameter.detach()))
        index.append(torch.arange(first, first + len(parts[-1])))
        begin += size
    local = torch.cat(parts).double()
    sums = local.new_zeros(2, begin)
    sums[:, torch.cat(index).to(local.device)] = torch.stack([local, torch.ones_like(local)])
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        dist.all_reduce(sums)
    return [values.tolist() for values in torch.split((sums[0] / sums[1]).cpu(), sizes)]


@dataclass(frozen=True)
class Straggler:
    """The slowest rank, its busy seconds a step, the median of all ranks, and the ratio of the two."""

    slowest_rank: int
    slowest_seconds: float
    median_seconds: float
    slowest_ratio: float


def slowest(seconds: list[float]) -> Straggler:
    """Of the busy seconds of each rank; the first one if several are equally slow."""
    most, median = max(seconds), statistics.median(seconds)
    return Straggler(seconds.index(most), most, median, most / median if median > 0 else 1.0)


class StragglerWatch:
    """The slowest rank, with a warning now and then on rank 0 when it is 1.3 times as slow as the median."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._warned_at = -_WARN_EVERY

    def check(self, busy_seconds: float) -> Straggler | None:
        """The same answer on every rank; None for a single rank. A collective: all ranks call it.

        Args:
            busy_seconds: a step of this rank without its waiting for the others (``Timings.busy``): with it, all ranks
                would take as long as the slowest.
        """
        if self.ranks.world == 1:
            return None
        mine = torch.tensor([busy_seconds], dtype=torch.float64, device=self.ranks.device)
        every = mine.new_empty(self.ranks.world)
        dist.all_gather_single(every, mine)
        found = slowest(every.tolist())
        late = time.monotonic() - self._warned_at >= _WARN_EVERY
        if self.ranks.main and found.slowest_ratio > _SLOW and late:
            self._warned_at = time.monotonic()
            logger.warning(
                "rank %d holds the others up: it is busy for %.3f s a step, the median is %.3f s (× %.2f)",
                *astuple(found),
            )
        return found


class Meter:
    """Measures steps with :attr:`timer`; :meth:`line` sums up those since the last line."""

    def __init__(self, config: RunConfig, task: Task, strategy: Strategy, ranks: Ranks) -> None:
        self.config, self.task, self.strategy, self.ranks = config, task, strategy, ranks
        self.timer = StepTimer(ranks.device)
        self._stragglers = StragglerWatch(ranks)
        self._utilization: Utilization | None = None

    def line(self) -> dict[str, float]:
        """The part of a line of metrics that is measured. All ranks call it together; every rank gets its own figures.

        Not under zero3: the weights of the averaging, which no rank holds whole.
        """
        timings = self.timer.window()
        speed = timings.speed(self.config.train.batch_size, self.ranks.world)
        slow = self._stragglers.check(timings.busy(gathers=self.strategy.collective_forward))
        used: dict[str, float] = {}
        with self.timer.paused():
            norms = averaging_norms(self.strategy.model) if self.strategy.readable else {}
            if self.ranks.main:
                if self._utilization is None:  # takes a second or two, which a start should not
                    self._utilization = Utilization.of_run(self.config, self.ranks.device, self.task.variates)
                used = self._utilization.line(speed["samples_per_second_per_rank"])
        return {
            **speed,
            **timings.line(),
            **used,
            "memory_peak_gib": memory_peak(self.ranks.device),
            **(asdict(slow) if slow is not None else {}),
            **{f"averaging_{family}": value for family, value in norms.items()},
        }
