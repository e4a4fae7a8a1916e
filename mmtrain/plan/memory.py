"""Bytes on the fullest rank under each strategy. Weights, gradients, AdamW's two moments and the EMA are float32."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mmtrain.config import RunConfig
from mmtrain.parallel.zero import BUCKET
from mmtrain.plan.results import Memory
from mmtrain.plan.shard import Unit
from mmtrain.plan.wire import FP32, zero3_held


@dataclass(frozen=True)
class Workload:
    """What does not depend on the strategy. ``kept`` and ``working``: bytes of a micro-batch, as in StepCosts."""

    parameters: int
    kept: int
    working: int
    micros: int
    ema: bool

    @property
    def bytes(self) -> int:
        return FP32 * self.parameters


def replicated_memory(load: Workload) -> Memory:
    """none and ddp: everything everywhere; DDP's buckets are the gradients (``gradient_as_bucket_view``)."""
    p = load.bytes
    return Memory(p, p, 2 * p, p if load.ema else 0, load.kept, load.working)


def fsdp_memory(load: Workload, units: list[Unit], reshard: bool) -> Memory:
    """fsdp and hsdp. Parameters, gradients, moments and EMA have the parts of rank 0.

    Gathered at once: the root; the largest unit, the next one's arriving beside it, and the buffer that they arrive in;
    without resharding all units. In the backward pass the largest unit's whole gradients and the buffer of their
    reduction; with several micro-batches all whole gradients, since they are reduced once a step.
    """
    local = FP32 * sum(unit.count * unit.local for unit in units)
    root = sum(unit.whole * unit.wire_bytes for unit in units if unit.root)
    gathered = sum(unit.count * unit.whole * unit.wire_bytes for unit in units if not unit.root)
    blocks = [unit for unit in units if not unit.root]
    largest = max((unit.whole * unit.wire_bytes for unit in blocks), default=0)
    arriving = max(unit.padded * unit.wire_bytes for unit in units)
    reduction = FP32 * max(unit.whole + unit.padded for unit in units)
    whole_gradients = load.bytes if load.micros > 1 else 0
    transient = root + (2 * largest if reshard else gathered) + arriving + reduction + whole_gradients
    ema = local if load.ema else 0
    return Memory(local, local, 2 * local, ema, load.kept, load.working + transient)


def zero12_memory(load: Workload, stage: int, padded: int, world: int, offload: bool) -> Memory:
    """DeepSpeed 0.19's ``stage_1_and_2.py``, in float32.

    Beside the flat weights each rank keeps its part of them once more, as what the optimizer updates, and the moments
    of that. Gradients pass through two buckets of ``BUCKET`` elements (``reduce_bucket_size``, doubled by
    ``overlap_comm``). Stage 1 keeps all gradients until the step, in a bucket while they fit into it; stage 2 its own
    part. Both hold all of them while several micro-batches are summed up. With ``offload`` the part and the moments are
    on the CPU.
    """
    whole, part = FP32 * padded, FP32 * padded // world
    all_of_them = stage == 1 or load.micros > 1
    gradients = whole if all_of_them else part
    buckets = 2 * FP32 * BUCKET
    # those of stage 1 stay where they were reduced; the flat gradient of the own part is made beside them
    transient = max(buckets - (whole if stage == 1 and load.micros == 1 else 0), 0) + part
    optimizer = 0 if offload else 3 * part
    return Memory(whole, gradients, optimizer, whole if load.ema else 0, load.kept, load.working + transient)


def zero3_memory(load: Workload, local: int, offload: bool, reshard: bool = True) -> Memory:
    """DeepSpeed 0.19's ``stage3.py``, in float32: the optimizer updates the parts themselves, without a copy.

    ``local``: elements of this rank, every parameter's rounded up. A bucket of ``BUCKET`` elements stays allocated;
    gathered are those parameters that :func:`mmtrain.plan.wire.zero3_held` keeps.
    """
    part = FP32 * local
    gathered = FP32 * zero3_held(load.parameters, reshard)
    gradients = load.bytes if load.micros > 1 else part
    transient = FP32 * BUCKET + gathered + part
    optimizer = 0 if offload else 2 * part
    return Memory(part, gradients, optimizer, part if load.ema else 0, load.kept, load.working + transient)


def zero12_padded(model: nn.Module, world: int) -> int:
    """Elements of DeepSpeed's flat buffers: one for each of our two groups (with decay, without), each padded to twice
    the ranks."""
    decayed = sum(p.numel() for p in model.parameters() if _decays(p))
    rest = sum(p.numel() for p in model.parameters()) - decayed
    unit = 2 * world
    return sum(-(-size // unit) * unit for size in (decayed, rest))


def zero3_local(model: nn.Module, world: int) -> int:
    """Elements of a rank when each parameter is cut into equal parts, the last one padded."""
    return sum(-(-p.numel() // world) for p in model.parameters())


def _decays(p: nn.Parameter) -> bool:
    """As :func:`mmtrain.train.optim.build_optimizer` sorts them."""
    return p.ndim > 1 and not getattr(p, "_no_weight_decay", False)


def workload(config: RunConfig, parameters: int, kept: int, working: int, micros: int) -> Workload:
    return Workload(parameters, kept, working, micros, config.train.ema_decay is not None)
