"""The time of a step, estimated by a roofline. Nothing here was measured; ASSUMPTIONS says what it rests on."""

from __future__ import annotations

import math

from mmtrain.plan.gpus import Gpu
from mmtrain.plan.results import StepTime
from mmtrain.plan.step import StepCosts
from mmtrain.plan.tracing import Cost, Costs
from mmtrain.plan.wire import Transfer

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
