"""What each strategy holds on the fullest rank, and what a rank sends in a step.

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
                      shard's gradients over R = W/S copies
zero1, zero2          all-reduce of the gradients (DeepSpeed's      3 (W-1)/W P
                      ``use_multi_rank_bucket_allreduce``, on by
                      default), all-gather of the new weights
zero3                 as fsdp; with reshard_after_forward=false     3 (W-1)/W P with one micro-batch, or as
                      what is used again within 10⁹ elements is     little as 2 (W-1)/W P
                      not gathered for the backward
====================  ============================================  ============================================

P is 4 bytes an element (2 where parallel.gather=bf16 gathers as bf16), after padding to equal shards: with thousands
of ranks the padding is most of it. Ring algorithms: an all-gather or reduce-scatter of M bytes over n ranks sends
(n-1)/n M from each, an all-reduce twice that. Left out: the gradient's norm and the loss, a few bytes.

Weights, gradients, AdamW's two moments and the EMA are float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import nn

from mmtrain.parallel.zero import BUCKET
from mmtrain.plan.sharding import Unit
from mmtrain.train.optim import decays

FP32 = 4
#: DDP's default bucket of gradients, in bytes (``bucket_cap_mb``).
DDP_BUCKET = 25 * 2**20
#: How far ahead ZeRO-3 looks, in elements, before it drops a parameter (with reshard_after_forward=false).
ZERO_REUSE = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    ``activations``: what one micro-batch keeps for its backward pass. ``transient``: what comes and goes: gathered
    parameters, buckets, results under way; taken as if all of it came at once, in the fullest moment.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    transient: int

    @property
    def state(self) -> int:
        """What is there between steps, and the gradients."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


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


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step.

    ``payload``: bytes of the whole (gathered, or unreduced) tensor, all ``calls`` together; ``ranks``: those that take
    part. ``overlapped``: it runs beside computation. ``across_nodes``: its ring leaves the node.
    """

    kind: str
    payload: int
    ranks: int
    calls: int
    overlapped: bool = True
    across_nodes: bool = False

    @property
    def sent(self) -> float:
        """Bytes that one rank sends, by ring."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * (self.ranks - 1) / self.ranks * self.payload


def ddp_transfers(elements: int, world: int, across: bool) -> list[Transfer]:
    """``elements`` of gradients, averaged in buckets."""
    size = FP32 * elements
    return [Transfer("all-reduce", size, world, -(-size // DDP_BUCKET), across_nodes=across)]


def fsdp_transfers(
    units: list[Unit], copies: int, micros: int, reshard: bool, across_shards: bool, across_copies: bool
) -> list[Transfer]:
    """``units`` as :func:`mmtrain.plan.sharding.fsdp_units` gives them; ``copies`` of the model (1 for fsdp)."""
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
    """DeepSpeed's stages, in float32. ``padded``: elements of all shards together."""
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
    """Elements that ZeRO-3 keeps gathered from the forward to the backward pass: none with ``reshard``.

    Without it, a parameter with x elements behind it in the model is used again after 2x: the last ``ZERO_REUSE`` / 2
    stay.
    """
    return 0 if reshard else min(elements, ZERO_REUSE // 2)


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


def zero3_memory(load: Workload, local: int, offload: bool, reshard: bool) -> Memory:
    """DeepSpeed 0.19's ``stage3.py``, in float32: the optimizer updates the parts themselves, without a copy.

    ``local``: elements of this rank, every parameter's rounded up. A bucket of ``BUCKET`` elements stays allocated;
    gathered are those parameters that :func:`zero3_held` keeps.
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
    decayed = sum(p.numel() for p in model.parameters() if decays(p))
    rest = sum(p.numel() for p in model.parameters()) - decayed
    unit = 2 * world
    return sum(-(-size // unit) * unit for size in (decayed, rest))


def zero3_local(model: nn.Module, world: int) -> int:
    """Elements of a rank when each parameter is cut into equal parts, the last one padded."""
    return sum(-(-p.numel() // world) for p in model.parameters())
