"""Memory of each strategy on the rank with the largest share, and bytes that a rank sends per step.

====================  ============================================  ============================================
strategy              collectives of a step                         sent by a rank, with P bytes of parameters
====================  ============================================  ============================================
none                  none                                          0
ddp                   all-reduce of the gradients                   2 (W-1)/W P
fsdp                  all-gather twice (once with                   2 m (W-1)/W P + (W-1)/W P
                      reshard_after_forward=false; the root once)
                      in each of m micro-batches,
                      reduce-scatter of the gradients once
hsdp                  fsdp over S shards, then all-reduce of the    as fsdp with S for W, + 2 (R-1)/R P/S
                      shard's gradients over R = W/S replicas
zero1, zero2          all-reduce of the gradients (DeepSpeed's      3 (W-1)/W P
                      ``use_multi_rank_bucket_allreduce``, on by
                      default), all-gather of the new weights
zero3                 as fsdp; with reshard_after_forward=false,    3 (W-1)/W P with one micro-batch, at
                      parameters reused within 10⁹ elements are     least 2 (W-1)/W P
                      not gathered for the backward pass
====================  ============================================  ============================================

P is 4 bytes per element (2 with parallel.gather=bf16) after padding to equal shards; with thousands of ranks most of it
is padding. W is the world size. Collectives use rings: in an all-gather or reduce-scatter of M bytes over n ranks each
rank sends (n-1)/n M, in an all-reduce twice as much. The few bytes of the gradient norm and the loss are not counted.

Weights, gradients, AdamW's two moments and the averaged weights are float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import nn

from mmtrain.parallel.zero import BUCKET
from mmtrain.plan.sharding import Unit
from mmtrain.train.optim import decays

FP32 = 4
#: Default size of DDP's gradient buckets in bytes (``bucket_cap_mb``).
DDP_BUCKET = 25 * 2**20
#: With reshard_after_forward=false, ZeRO-3 keeps a parameter that is reused within this many elements.
ZERO_REUSE = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Memory in bytes on the rank with the largest share.

    Attributes:
        weights: Parameters.
        gradients: Gradients.
        optimizer: Moments, and for zero1 and zero2 the rank's copy of its weights.
        ema: Averaged weights.
        activations: Tensors that one micro-batch saves for its backward pass.
        transient: Gathered parameters, buckets and intermediate results, as if all had their peak at the same time.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    transient: int

    @property
    def state(self) -> int:
        """Memory in use between steps, including gradients."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Workload:
    """Sizes that do not depend on the strategy. ``kept`` and ``working`` are those of StepCosts, in bytes."""

    parameters: int
    kept: int
    working: int
    micros: int
    ema: bool

    @property
    def bytes(self) -> int:
        return FP32 * self.parameters


@dataclass(frozen=True)
class Transfer:
    """The collectives of one kind in a step.

    Attributes:
        kind: Name of the collective.
        payload: Bytes of the whole (gathered or unreduced) tensors of all calls.
        ranks: Number of participating ranks.
        calls: Number of calls.
        overlapped: Whether it overlaps computation.
        across_nodes: Whether its ring spans several nodes.
    """

    kind: str
    payload: int
    ranks: int
    calls: int
    overlapped: bool = True
    across_nodes: bool = False

    @property
    def sent(self) -> float:
        """Bytes that one rank sends in a ring."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * (self.ranks - 1) / self.ranks * self.payload


def ddp_transfers(elements: int, world: int, across: bool) -> list[Transfer]:
    """Return the all-reduces of ``elements`` gradients in buckets."""
    size = FP32 * elements
    return [Transfer("all-reduce", size, world, -(-size // DDP_BUCKET), across_nodes=across)]


def fsdp_transfers(
    units: list[Unit], copies: int, micros: int, reshard: bool, across_shards: bool, across_copies: bool
) -> list[Transfer]:
    """Return the collectives of fsdp and hsdp.

    Args:
        units: The units returned by :func:`mmtrain.plan.sharding.fsdp_units`.
        copies: Number of replicas (1 for fsdp).
        micros: Micro-batches per step.
        reshard: ``parallel.reshard_after_forward``.
        across_shards: Whether the ranks of one replica are on several nodes.
        across_copies: Whether the replicas are on several nodes.
    """
    shards = units[0].shards
    gathered = calls = reduced = local = 0
    for unit in units:
        times = micros * (1 if unit.root or not reshard else 2)
        gathered += unit.count * times * unit.padded * unit.wire_bytes
        calls += unit.count * times
        reduced += unit.count * unit.padded * FP32
        local += unit.count * unit.local * FP32
    number = sum(unit.count for unit in units)
    found = [
        Transfer("all-gather", gathered, shards, calls, across_nodes=across_shards),
        Transfer("reduce-scatter", reduced, shards, number, across_nodes=across_shards),
    ]
    if copies > 1:
        found.append(Transfer("all-reduce", local, copies, number, across_nodes=across_copies))
    return found


def zero_transfers(
    stage: int, elements: int, padded: int, world: int, micros: int, across: bool, reshard: bool
) -> list[Transfer]:
    """Return the collectives of DeepSpeed's ZeRO stages in float32.

    ``padded`` is the number of elements of all shards together, including padding.
    """
    buckets = -(-elements // BUCKET)
    if stage < 3:
        return [
            Transfer("all-reduce", FP32 * elements, world, buckets, across_nodes=across),
            Transfer("all-gather", FP32 * padded, world, 2, overlapped=False, across_nodes=across),
        ]
    again = padded - min(padded, zero3_held(elements, reshard))
    gathered = micros * (padded + again)
    return [
        Transfer("all-gather", FP32 * gathered, world, -(-gathered // BUCKET), across_nodes=across),
        Transfer("reduce-scatter", FP32 * padded, world, buckets, across_nodes=across),
    ]


def zero3_held(elements: int, reshard: bool) -> int:
    """Return the number of elements that ZeRO-3 keeps gathered from the forward to the backward pass.

    It is 0 with ``reshard``. Otherwise a parameter with x elements after it in the model is reused after 2x elements,
    so the last ``ZERO_REUSE`` / 2 elements stay gathered.
    """
    return 0 if reshard else min(elements, ZERO_REUSE // 2)


def replicated_memory(load: Workload) -> Memory:
    """Return the memory of none and ddp: a full replica. DDP's buckets are the gradients (gradient_as_bucket_view)."""
    p = load.bytes
    return Memory(p, p, 2 * p, p if load.ema else 0, load.kept, load.working)


def fsdp_memory(load: Workload, units: list[Unit], reshard: bool) -> Memory:
    """Return the memory of fsdp and hsdp on rank 0.

    Parameters, gradients, moments and averaged weights are sharded. Gathered at the same time are the root, the largest
    unit, the next unit and its receive buffer, or all units without resharding. The backward pass adds the unsharded
    gradients of the largest unit and their reduction buffer, or with several micro-batches all unsharded gradients,
    because they are reduced once per step.
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
    """Return the memory of zero1 and zero2, as in ``stage_1_and_2.py`` of DeepSpeed 0.19, in float32.

    In addition to the flat weights, each rank keeps a copy of its share, which the optimizer updates, and its moments.
    Gradients pass through two buckets of ``BUCKET`` elements (``reduce_bucket_size``, doubled by ``overlap_comm``).
    Stage 1 keeps all gradients until the step, in a bucket if they fit into it; stage 2 keeps its share. Both keep all
    gradients during accumulation. With ``offload``, the copy and the moments are on the CPU.
    """
    whole, part = FP32 * padded, FP32 * padded // world
    all_of_them = stage == 1 or load.micros > 1
    gradients = whole if all_of_them else part
    buckets = 2 * FP32 * BUCKET
    # stage 1 keeps its gradients in the buckets, and creates the flat gradient of its share in addition
    transient = max(buckets - (whole if stage == 1 and load.micros == 1 else 0), 0) + part
    optimizer = 0 if offload else 3 * part
    return Memory(whole, gradients, optimizer, whole if load.ema else 0, load.kept, load.working + transient)


def zero3_memory(load: Workload, local: int, offload: bool, reshard: bool) -> Memory:
    """Return the memory of zero3, as in ``stage3.py`` of DeepSpeed 0.19, in float32.

    The optimizer updates the shards directly, without a copy. A bucket of ``BUCKET`` elements stays allocated.
    :func:`zero3_held` gives the gathered parameters. ``local`` is the number of elements per rank, rounded up for
    every parameter.
    """
    part = FP32 * local
    gathered = FP32 * zero3_held(load.parameters, reshard)
    gradients = load.bytes if load.micros > 1 else part
    transient = FP32 * BUCKET + gathered + part
    optimizer = 0 if offload else 2 * part
    return Memory(part, gradients, optimizer, part if load.ema else 0, load.kept, load.working + transient)


def zero12_padded(model: nn.Module, world: int) -> int:
    """Return the number of elements of DeepSpeed's flat buffers.

    There is one buffer per parameter group (with and without weight decay), each padded to a multiple of twice the
    world size.
    """
    decayed = sum(p.numel() for p in model.parameters() if decays(p))
    rest = sum(p.numel() for p in model.parameters()) - decayed
    unit = 2 * world
    return sum(-(-size // unit) * unit for size in (decayed, rest))


def zero3_local(model: nn.Module, world: int) -> int:
    """Return the number of elements per rank if each parameter is split into equal shards, the last one padded."""
    return sum(-(-p.numel() // world) for p in model.parameters())
