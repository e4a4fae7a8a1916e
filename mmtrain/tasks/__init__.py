"""Tasks: the only place where model, loss, metrics and data meet."""

from mmtrain.config import RunConfig
from mmtrain.tasks.base import Batch, StepKey, Task

__all__ = ["Batch", "StepKey", "Task", "build_task"]


def build_task(config: RunConfig) -> Task:
    """The task that ``config.task.kind`` names, with its data opened."""
    from mmtrain.tasks.classification import Classification
    from mmtrain.tasks.forecasting import Forecasting

    kinds: dict[str, type[Task]] = {"classification": Classification, "forecasting": Forecasting}
    return kinds[config.task.kind](config)
