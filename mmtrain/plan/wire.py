"""What each strategy sends: bytes on the wire, a rank and step.

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
"""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.parallel.zero import BUCKET
from mmtrain.plan.shard import Unit

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
    """``units`` as :func:`mmtrain.plan.shard.fsdp_units` gives them; ``copies`` of the model (1 for fsdp)."""
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
