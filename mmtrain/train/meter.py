"""What a line of metrics tells of the machine: speed, where the time goes, utilisation, memory, stragglers."""

from __future__ import annotations

from mmtrain.config import RunConfig
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import Strategy
from mmtrain.tasks import Task
from mmtrain.train.flops import Utilization
from mmtrain.train.health import averaging_norms, memory_peak
from mmtrain.train.stragglers import StragglerWatch
from mmtrain.train.timing import StepTimer


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
        slowest = self._stragglers.check(timings.busy(gathers=self.strategy.collective_forward))
        with self.timer.paused():
            norms = averaging_norms(self.strategy.model) if self.strategy.readable else {}
            used = self._used(speed["samples_per_second_per_rank"]) if self.ranks.main else {}
        return {
            **speed,
            **timings.line(),
            **used,
            "memory_peak_gib": memory_peak(self.ranks.device),
            **(slowest.line() if slowest is not None else {}),
            **{f"averaging_{family}": value for family, value in norms.items()},
        }

    def _used(self, samples_per_second: float) -> dict[str, float]:
        if self._utilization is None:  # takes a second or two, which a start should not
            self._utilization = Utilization.of_run(self.config, self.ranks.device, self.task.variates)
        return self._utilization.line(samples_per_second)
