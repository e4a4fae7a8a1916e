"""A process group of any size in one process, for shapes only: no collective of it moves anything.

How FSDP2 would split a model over a mesh of any size: by really splitting it, on the meta device.

What each strategy sends: bytes on the wire, a rank and step.

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

Bytes on the fullest rank under each strategy. Weights, gradients, AdamW's two moments and the EMA are float32.

The time of a step, estimated by a roofline. Nothing here was measured; ASSUMPTIONS says what it rests on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mmtrain.config import ParallelConfig, RunConfig
from mmtrain.errors import UserError
from mmtrain.models.averaging import block_places
from mmtrain.parallel.fsdp import apply_fsdp
from mmtrain.parallel.zero import BUCKET
from mmtrain.plan.gpus import Gpu
from mmtrain.plan.results import Memory, StepTime
from mmtrain.plan.step import Cost, Costs, StepCosts


@contextmanager
def fake_group(world: int) -> Iterator[None]:
    """Within the context this process is rank 0 of ``world``; afterwards there is no process group, as before.

    Raises:
        UserError: when this process is in a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError(
            "mmtrain plan makes a process group of its own, and this process is in one: plan before training starts,"
            " or in another process"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


#: Beyond so many shards what is left of the model is split on the CPU: FSDP2 makes an empty tensor for every rank that
#: gets nothing of a parameter, which on the meta device costs ten times as much. No page of it is touched but rank 0's.
_MANY = 64


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers at once, ``count`` times in the model.

    ``local``: elements on each rank, where the first dimension of every parameter is rounded up to a multiple of the
    shards, as FSDP2 does; ``whole``: elements of the parameters; ``shards``: ranks that share one copy. ``wire_bytes``:
    bytes an element when gathered. ``root``: stays gathered from forward to backward.
    """

    local: int
    whole: int
    shards: int
    wire_bytes: int
    count: int = 1
    root: bool = False

    @property
    def padded(self) -> int:
        """Elements that a gather brings together, padding included."""
        return self.local * self.shards


def fsdp_units(model: nn.Module, shape: tuple[int, ...], config: ParallelConfig) -> list[Unit]:
    """Split ``model`` (on the meta device) over a fake mesh and read off the parts of rank 0, the fullest.

    Splitting takes time in proportion to ranks × parameters, so of the blocks that hold the same shapes one is split,
    and stands for all; the others are emptied.

    Args:
        shape: the mesh: (ranks,) for fsdp, (copies, shards) for hsdp.
    """
    counts = _thin_out(model)
    if shape[-1] > _MANY:
        model.to_empty(device="cpu")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    apply_fsdp(model, list(counts), mesh, config)
    units = []
    for module, parameters in _owned(model).items():
        times = next((n for block, n in counts.items() if module in set(block.modules())), 1)
        narrow = cast(Any, module)._get_fsdp_state()._mp_policy.param_dtype
        units.append(
            Unit(
                local=sum(p.to_local().numel() for p in parameters),
                whole=sum(p.numel() for p in parameters),
                shards=shape[-1],
                wire_bytes=4 if narrow is None else narrow.itemsize,
                count=times,
                root=module is model,
            )
        )
    return units


def _thin_out(model: nn.Module) -> dict[nn.Module, int]:
    """Keep one block of each kind, with the number of them, and put modules without parameters in the others' place."""
    kept: dict[tuple[Any, ...], nn.Module] = {}
    counts: Counter[nn.Module] = Counter()
    for where, i in block_places(model):
        block = where[i]
        kind = (type(block), *((name, p.shape) for name, p in block.named_parameters()))
        first = kept.setdefault(kind, block)
        counts[first] += 1
        if block is not first:
            where[i] = nn.Identity()
    return dict(counts)


def _owned(model: nn.Module) -> dict[nn.Module, list[DTensor]]:
    """The parameters of each FSDP unit: those that no unit within it holds."""
    found: dict[nn.Module, list[DTensor]] = {}

    def visit(module: nn.Module, owner: nn.Module) -> None:
        owner = module if isinstance(module, FSDPModule) else owner
        for p in module.parameters(recurse=False):
            found.setdefault(owner, []).append(cast(DTensor, p.data))
        for child in module.children():
            visit(child, owner)

    visit(model, model)
    return found


FP32 = 4
#: DDP's default bucket of gradients, in bytes (``bucket_cap_mb``).
DDP_BUCKET = 25 * 2**20
#: How far ahead ZeRO-3 looks, in elements, before it drops a parameter (with reshard_after_forward=false).
ZERO_REUSE = 1_000_000_000


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
    """``units`` as :func:`mmtrain.plan.costs.fsdp_units` gives them; ``copies`` of the model (1 for fsdp)."""
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
    stage: int, elements: int, padded: int, world: int, micros: int, across: bool, reshard: bool = True
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
    gathered are those parameters that :func:`mmtrain.plan.costs.zero3_held` keeps.
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


#: What a tuned kernel reaches of a data sheet's rate.
MATRIX, VECTOR, MEMORY, NETWORK = 0.6, 0.5, 0.8, 0.8
#: Seconds to launch a kernel from Python, and for a message to cross one hop of a collective's tree.
LAUNCH, HOP = 5e-6, 10e-6
#: Bytes an element that AdamW moves: reads weight, gradient and two moments, writes all but the gradient; and the EMA.
_ADAMW, _EMA = 28, 12

ASSUMPTIONS = (
    f"each operation takes the longest of its FLOPs at {MATRIX:.0%} (matrix units) or {VECTOR:.0%} (vector units, as"
    f" scans and convolutions) of the data sheet's rate, its reads and writes at {MEMORY:.0%} of the memory's, and a"
    f" launch of {LAUNCH * 1e6:.0f} µs; nothing is fused beyond the kernels of the scan and its convolution",
    f"links give {NETWORK:.0%} of their rate, rings move the bytes, a collective adds {HOP * 1e6:.0f} µs × log2 of its"
    " ranks; what runs beside computation counts only where it takes longer",
    "loading, evaluation, checkpoints and restarts are left out",
)


def step_time(
    costs: StepCosts,
    *,
    micros: int,
    tf32: bool,
    gpu: Gpu,
    transfers: list[Transfer],
    local: int,
    ema: int,
    gathers_in_forward: bool,
) -> StepTime:
    """Seconds of a step of ``micros`` micro-batches.

    Args:
        local: elements that this rank's optimizer updates, ``ema`` those that its average does.
        gathers_in_forward: whether communication may hide behind the forward passes too, not only behind the last
            backward pass.
    """
    forward, backward = (_pass_time(part, gpu, tf32) for part in (costs.forward, costs.backward))
    compute = micros * (forward + backward)
    optimizer = (_ADAMW * local + _EMA * ema) / (MEMORY * gpu.bandwidth * 1e9)
    hidden = [_transfer_time(t, gpu) for t in transfers if t.overlapped]
    open_ = [_transfer_time(t, gpu) for t in transfers if not t.overlapped]
    # the last piece of what runs beside computation has nothing left to hide behind
    tails = [_transfer_time(t, gpu) / max(t.calls, 1) for t in transfers if t.overlapped]
    window = compute if gathers_in_forward else backward
    exposed = sum(open_) + max(sum(hidden) - window, sum(tails), 0.0)
    return StepTime(compute, optimizer, sum(hidden) + sum(open_), exposed)


def _pass_time(costs: Costs, gpu: Gpu, tf32: bool) -> float:
    return sum(count * _operation_time(cost, gpu, tf32) for cost, count in costs.counts.items())


def _operation_time(cost: Cost, gpu: Gpu, tf32: bool) -> float:
    rate = MATRIX * gpu.matrix_rate(cost.matrix, tf32) if cost.matrix else VECTOR * 1e12 * gpu.fp32
    return max(cost.flops / rate, cost.moved / (MEMORY * gpu.bandwidth * 1e9), LAUNCH)


def _transfer_time(transfer: Transfer, gpu: Gpu) -> float:
    if transfer.ranks < 2:
        return 0.0
    link = gpu.inter if transfer.across_nodes else gpu.intra
    hops = math.ceil(math.log2(transfer.ranks))
    return transfer.sent / (NETWORK * link * 1e9) + transfer.calls * hops * HOP
