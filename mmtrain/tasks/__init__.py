"""Tasks: the only place where model, loss, metrics and data meet.

A task is one module here, registered for its section with ``@TASKS.implements``. How training steps are taken belongs
to ``mmtrain.train``.
"""

from typing import cast

from mmtrain.config import TASKS, RunConfig
from mmtrain.tasks.base import Batch, StepKey, Task

__all__ = ["Batch", "StepKey", "Task", "build_task"]


def build_task(config: RunConfig) -> Task:
    """The task that ``config.task.kind`` names, with its data opened."""
    return cast(Task, TASKS.implementation(config.task)(config))
