"""What a run would need before it is started: memory, traffic, time and data, found on the meta device."""

from mmtrain.plan.gpus import GPUS, Gpu, find_gpu
from mmtrain.plan.planner import MAX_RANKS, plan_run
from mmtrain.plan.results import Plan, StrategyPlan

__all__ = ["GPUS", "MAX_RANKS", "Gpu", "Plan", "StrategyPlan", "find_gpu", "plan_run"]
