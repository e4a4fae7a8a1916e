"""What a run would need before it is started: memory, traffic, time and data, found on the meta device.

``step`` traces one micro-batch, ``sharding`` splits the model, ``strategies`` and ``roofline`` turn that into memory,
traffic and time, ``planner`` puts the plan together. Nothing here trains; what a model costs in itself is told by
``mmtrain.inspect``.
"""

from mmtrain.plan.planner import MAX_RANKS, plan_run
from mmtrain.plan.results import Plan, StrategyPlan, render
from mmtrain.plan.roofline import GPUS, Gpu, find_gpu

__all__ = ["GPUS", "MAX_RANKS", "Gpu", "Plan", "StrategyPlan", "find_gpu", "plan_run", "render"]
