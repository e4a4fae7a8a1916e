"""Estimate of the memory, traffic, time and data rate of a run, computed on the meta device before the run starts.

``step`` traces one micro-batch, ``sharding`` shards the model, ``strategies`` and ``roofline`` compute memory, traffic
and time from these, and ``planner`` assembles the plan. Nothing here trains. ``mmtrain.inspect`` reports the cost of a
model itself.
"""

from mmtrain.plan.planner import MAX_RANKS, plan_run
from mmtrain.plan.results import Plan, StrategyPlan, render
from mmtrain.plan.roofline import GPUS, Gpu, find_gpu

__all__ = ["GPUS", "MAX_RANKS", "Gpu", "Plan", "StrategyPlan", "find_gpu", "plan_run", "render"]
