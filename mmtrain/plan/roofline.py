"""The memory and the links of GPUs, and the time of a step on them, estimated by a roofline.

Nothing here was measured; :data:`ASSUMPTIONS` says what the estimate rests on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmtrain.errors import UserError, nearest
from mmtrain.plan.step import Cost, Costs, StepCosts
from mmtrain.plan.strategies import Transfer
from mmtrain.train.flops import peak_by_name

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


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU.

    ``driver_name``: its name in the table of :mod:`mmtrain.train.flops`, which has its FLOP/s. ``memory``: GiB.
    ``bandwidth``: of that memory, GB/s. ``intra``: to the other GPUs of a node, ``inter``: to other nodes; GB/s for one
    GPU and one direction. ``source``: where the figures of the chip are from. The links of a node are a choice of who
    builds it: ``links`` says which we assume.
    """

    name: str
    driver_name: str
    memory: float
    bandwidth: float
    intra: float
    inter: float
    source: str
    links: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory * 2**30)

    def rate(self, precision: str) -> float:
        """Peak FLOP/s in bf16, fp16, tf32 or fp32; that of fp32 where the GPU has no unit for the format."""
        peak = peak_by_name(self.driver_name, precision) or peak_by_name(self.driver_name, "fp32")
        assert peak is not None, self.driver_name
        return peak

    def matrix_rate(self, dtype: str, tf32: bool) -> float:
        """FLOP/s of matrix products of operands of ``dtype`` (bfloat16, float16 or float32)."""
        return self.rate({"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "tf32" if tf32 else "fp32"))


_HGX = "NVLink; a 400 Gb/s adapter a GPU"
_A100 = "NVLink; a 200 Gb/s adapter a GPU"
_PCIE = "PCIe 4.0 x16; a 200 Gb/s adapter for two GPUs"
_H100_SHEET, _A100_SHEET = (f"NVIDIA {chip} Tensor Core GPU data sheet" for chip in ("H100", "A100"))
_V100_SHEET = "NVIDIA V100 data sheet (SXM2, 32 GB); it has no bf16 and no TF32 units"
_ADA_PAPER = "NVIDIA Ada GPU architecture white paper (products with fp32 accumulation)"
_XGMI = "Infinity Fabric, 7 links; a 400 Gb/s adapter a GPU"
_TABLE = (
    Gpu("h100", "H100 80GB HBM3", 80, 3350, 450, 50, f"{_H100_SHEET} (SXM5)", _HGX),
    Gpu("h200", "H200", 141, 4800, 450, 50, "NVIDIA H200 Tensor Core GPU data sheet (SXM)", _HGX),
    Gpu("b200", "B200", 180, 7700, 900, 50, "NVIDIA HGX platform, B200 (an eighth of the board)", _HGX),
    Gpu("a100-80gb", "A100-SXM4-80GB", 80, 2039, 300, 25, f"{_A100_SHEET} (SXM4, 80 GB)", _A100),
    Gpu("a100-40gb", "A100-SXM4-40GB", 40, 1555, 300, 25, f"{_A100_SHEET} (SXM4, 40 GB)", _A100),
    Gpu("l40s", "L40S", 48, 864, 32, 12.5, "NVIDIA L40S data sheet", _PCIE),
    Gpu("v100", "V100-SXM2-32GB", 32, 900, 150, 12.5, _V100_SHEET, "NVLink; a 100 Gb/s adapter a GPU"),
    Gpu("rtx4090", "GeForce RTX 4090", 24, 1008, 32, 3.1, _ADA_PAPER, "PCIe 4.0 x16; 25 Gb/s a GPU"),
    Gpu("mi300x", "Instinct MI300X", 192, 5300, 448, 50, "AMD Instinct MI300X data sheet", _XGMI),
)

#: By name, as ``--gpu`` takes them.
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name``.

    Raises:
        UserError: for an unknown one, with the nearest.
    """
    found = GPUS.get(name.lower())
    if found is None:
        kinds = [f"'{known}'" for known in GPUS if known.startswith(f"{name.lower()}-")]
        hint = f"; did you mean {' or '.join(kinds)}?" if kinds else nearest(name.lower(), GPUS)
        raise UserError(f"--gpu (or cluster.gpu) {name}: no such GPU is known{hint} (known: {', '.join(GPUS)})")
    return found


@dataclass(frozen=True)
class StepTime:
    """An estimate. ``communication`` in all, ``exposed`` of it not hidden behind computation."""

    compute: float
    optimizer: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.exposed


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
    rate = MATRIX * gpu.matrix_rate(cost.matrix, tf32) if cost.matrix else VECTOR * gpu.rate("fp32")
    return max(cost.flops / rate, cost.moved / (MEMORY * gpu.bandwidth * 1e9), LAUNCH)


def _transfer_time(transfer: Transfer, gpu: Gpu) -> float:
    if transfer.ranks < 2:
        return 0.0
    link = gpu.inter if transfer.across_nodes else gpu.intra
    hops = math.ceil(math.log2(transfer.ranks))
    return transfer.sent / (NETWORK * link * 1e9) + transfer.calls * hops * HOP
