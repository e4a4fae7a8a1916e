"""Measured metrics of a run: speed, utilisation, memory, slow ranks, and the weights of the weighted averaging.

``timing.py`` measures the phases of a step. ``flops.py`` counts operations and lists the peaks of GPUs.
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

#: Names of the averaging weights, by (consumer is a channel mixer, source is a channel mixer).
_FAMILIES = {(False, False): "alpha", (False, True): "beta", (True, False): "theta", (True, True): "gamma"}
#: A rank is slow if its step time exceeds this multiple of the median; minimum seconds between two warnings.
_SLOW, _WARN_EVERY = 1.3, 600.0


def memory_peak(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated by torch on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would include the peak of the parent process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20  # KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS reports bytes, other systems KiB


def averaging_norms(model: nn.Module) -> dict[str, float]:
    """Return the distance of the weighted averaging from a plain residual stream, by family of weights.

    The distance is the root mean square, over all stacks, of (weight - initial weight). The initial weight is 1, or 0
    for the second copy of a stack's input. ``alpha`` and ``beta`` weigh token and channel outputs in the input of a
    token mixer, ``theta`` and ``gamma`` in the input of a channel mixer. The first copy of the input counts as a token
    output, the second as a channel output. ``out`` are all weights of the stacks' outputs. Families without weights
    are omitted; the result is empty for a model without weighted averaging.

    With sharded parameters (FSDP2) this is a collective: every rank must call it.

    Raises:
        ValueError: if a parameter is sharded but not a DTensor (ZeRO-3). Gather it first.
    """
    parameters: list[Tensor] = []
    families: list[list[str]] = []  # the family of each element of each parameter
    for stack in model.modules():
        if not isinstance(stack, MixerStack):
            continue
        channel = [getattr(mixer, "mixes", "") == "channels" for mixer in stack.mixers]
        for i, average in enumerate(cast(Iterable[WeightedAverage], stack.averages)):
            parameters += [average.weight, average.input_copy]
            # The first copy of the stack's input counts as a token output, the second as a channel output.
            sources = [False, *channel[:i], True]
            found = [_FAMILIES[channel[i], source] if i < len(channel) else "out" for source in sources]
            families += [found[:-1], found[-1:]]
    if not parameters:
        return {}
    squares: dict[str, list[float]] = {family: [] for family in (*_FAMILIES.values(), "out")}
    for i, values in enumerate(_elements(parameters, [len(labels) for labels in families])):
        start = float(i % 2 == 0)  # initial value: weights (even) start at 1, input copies (odd) at 0
        for family, value in zip(families[i], values, strict=True):
            squares[family].append((value - start) ** 2)
    return {family: (sum(found) / len(found)) ** 0.5 for family, found in squares.items() if found}


def _elements(parameters: list[Tensor], sizes: list[int]) -> list[list[float]]:
    """Gather the elements of one-dimensional parameters from all ranks. Parameter i has ``sizes[i]`` elements.

    Every rank writes its elements into one vector, and 1 into a vector of counts. The sum of the vectors divided by the
    sum of the counts is correct for sharded and replicated parameters. Hundreds of small parameters need one reduction.
    """
    shards, index, begin = [], [], 0
    for parameter, size in zip(parameters, sizes, strict=True):
        if parameter.numel() != size:
            raise ValueError(
                f"a parameter of the weighted averaging has {parameter.numel()} of {size} elements: gather it first"
            )
        first = begin
        if isinstance(parameter, DTensor):
            layout = parameter.shape, parameter.device_mesh, parameter.placements
            first += compute_local_shape_and_global_offset(*layout)[1][0]
        shards.append(to_local(parameter.detach()))
        index.append(torch.arange(first, first + len(shards[-1])))
        begin += size
    local = torch.cat(shards).double()
    sums = local.new_zeros(2, begin)
    sums[:, torch.cat(index).to(local.device)] = torch.stack([local, torch.ones_like(local)])
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        dist.all_reduce(sums)
    return [values.tolist() for values in torch.split((sums[0] / sums[1]).cpu(), sizes)]


@dataclass(frozen=True)
class Straggler:
    """The slowest rank, its busy seconds per step, the median over all ranks, and the ratio of slowest to median."""

    slowest_rank: int
    slowest_seconds: float
    median_seconds: float
    slowest_ratio: float


def slowest(seconds: list[float]) -> Straggler:
    """Return the slowest rank, given the busy seconds of each rank. The lowest rank wins a tie."""
    most, median = max(seconds), statistics.median(seconds)
    return Straggler(seconds.index(most), most, median, most / median if median > 0 else 1.0)


class StragglerWatch:
    """Finds the slowest rank. Rank 0 logs a warning if that rank takes more than 1.3 times the median.

    At most one warning is logged in ten minutes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._warned_at = -_WARN_EVERY

    def check(self, busy_seconds: float) -> Straggler | None:
        """Return the slowest rank, or None if there is one rank only. The result is the same on every rank.

        A collective: all ranks call it together.

        Args:
            busy_seconds: step time of this rank without waiting for other ranks (``Timings.busy``). Including the
                waiting, every rank takes as long as the slowest.
        """
        if self.ranks.world == 1:
            return None
        local = torch.tensor([busy_seconds], dtype=torch.float64, device=self.ranks.device)
        gathered = local.new_empty(self.ranks.world)
        dist.all_gather_single(gathered, local)
        found = slowest(gathered.tolist())
        late = time.monotonic() - self._warned_at >= _WARN_EVERY
        if self.ranks.main and found.slowest_ratio > _SLOW and late:
            self._warned_at = time.monotonic()
            logger.warning(
                "rank %d slows down the others: it needs %.3f s per step, the median rank %.3f s (× %.2f)",
                *astuple(found),
            )
        return found


class Meter:
    """Measures steps with :attr:`timer`. :meth:`line` summarises the steps since its last call."""

    def __init__(self, config: RunConfig, task: Task, strategy: Strategy, ranks: Ranks) -> None:
        self.config, self.task, self.strategy, self.ranks = config, task, strategy, ranks
        self.timer = StepTimer(ranks.device)
        self._stragglers = StragglerWatch(ranks)
        self._utilization: Utilization | None = None

    def line(self) -> dict[str, float]:
        """Return the measured metrics of the steps since the last call. Each rank gets its own figures.

        A collective: all ranks call it together. Under zero3, where no rank has whole parameters, the metrics of the
        weighted averaging are omitted.
        """
        timings = self.timer.window()
        speed = timings.speed(self.config.train.batch_size, self.ranks.world)
        slow = self._stragglers.check(timings.busy(gathers=self.strategy.collective_forward))
        used: dict[str, float] = {}
        with self.timer.paused():
            norms = averaging_norms(self.strategy.model) if self.strategy.readable else {}
            if self.ranks.main:
                if self._utilization is None:  # built late, since counting takes a second or two of the start
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
