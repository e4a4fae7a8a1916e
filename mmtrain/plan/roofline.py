"""Memory and links of GPUs, and a roofline estimate of the time of a step.

Nothing here was measured. :data:`ASSUMPTIONS` lists the assumptions of the estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmtrain.errors import UserError, nearest
from mmtrain.plan.step import Cost, Costs, StepCosts
from mmtrain.plan.strategies import Transfer
from mmtrain.train.flops import peak_by_name

#: Fractions of the data sheet's rates that a tuned kernel is assumed to reach.
MATRIX, VECTOR, MEMORY, NETWORK = 0.6, 0.5, 0.8, 0.8
#: Seconds to launch a kernel from Python, and for a message to cross one hop of a collective's tree.
LAUNCH, HOP = 5e-6, 10e-6
#: Bytes per element that AdamW moves (it reads weight, gradient and two moments, and writes all but the gradient), and
#: bytes per element that the update of the averaged weights moves.
_ADAMW, _EMA = 28, 12

ASSUMPTIONS = (
    f"an operation takes the longest of three times: its FLOPs at {MATRIX:.0%} of the data sheet's rate (matrix units)"
    f" or {VECTOR:.0%} (vector units: scans, convolutions), its reads and writes at {MEMORY:.0%} of the memory"
    f" bandwidth, and a launch of {LAUNCH * 1e6:.0f} µs; only the scan and its convolution are fused kernels",
    f"links reach {NETWORK:.0%} of their rate, collectives use rings and add {HOP * 1e6:.0f} µs × log2 of their ranks;"
    " communication that overlaps computation counts only if it takes longer",
    "data loading, evaluation, checkpoints and restarts are not included",
)


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU.

    Attributes:
        name: Name for ``--gpu``.
        driver_name: Name in the table of :mod:`mmtrain.train.flops`, which contains the FLOP/s.
        memory: Memory in GiB.
        bandwidth: Memory bandwidth in GB/s.
        intra: Bandwidth to the other GPUs of a node in GB/s, per GPU and direction.
        inter: Bandwidth to other nodes in GB/s, per GPU and direction.
        source: Source of the chip's figures.
        links: The assumed links, which depend on the builder of the node.
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
        """Return the peak FLOP/s in bf16, fp16, tf32 or fp32, or that of fp32 if the GPU lacks the format."""
        peak = peak_by_name(self.driver_name, precision) or peak_by_name(self.driver_name, "fp32")
        assert peak is not None, self.driver_name
        return peak

    def matrix_rate(self, dtype: str, tf32: bool) -> float:
        """Return the peak FLOP/s of matrix products of ``dtype`` (bfloat16, float16 or float32)."""
        return self.rate({"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "tf32" if tf32 else "fp32"))


_HGX = "NVLink; one 400 Gb/s adapter per GPU"
_A100 = "NVLink; one 200 Gb/s adapter per GPU"
_PCIE = "PCIe 4.0 x16; one 200 Gb/s adapter per two GPUs"
_H100_SHEET, _A100_SHEET = (f"NVIDIA {chip} Tensor Core GPU data sheet" for chip in ("H100", "A100"))
_V100_SHEET = "NVIDIA V100 data sheet (SXM2, 32 GB); it has no bf16 and no TF32 units"
_ADA_PAPER = "NVIDIA Ada GPU architecture white paper (products with fp32 accumulation)"
_XGMI = "Infinity Fabric, 7 links; one 400 Gb/s adapter per GPU"
_TABLE = (
    Gpu("h100", "H100 80GB HBM3", 80, 3350, 450, 50, f"{_H100_SHEET} (SXM5)", _HGX),
    Gpu("h200", "H200", 141, 4800, 450, 50, "NVIDIA H200 Tensor Core GPU data sheet (SXM)", _HGX),
    Gpu("b200", "B200", 180, 7700, 900, 50, "NVIDIA HGX platform, B200 (an eighth of the board)", _HGX),
    Gpu("a100-80gb", "A100-SXM4-80GB", 80, 2039, 300, 25, f"{_A100_SHEET} (SXM4, 80 GB)", _A100),
    Gpu("a100-40gb", "A100-SXM4-40GB", 40, 1555, 300, 25, f"{_A100_SHEET} (SXM4, 40 GB)", _A100),
    Gpu("l40s", "L40S", 48, 864, 32, 12.5, "NVIDIA L40S data sheet", _PCIE),
    Gpu("v100", "V100-SXM2-32GB", 32, 900, 150, 12.5, _V100_SHEET, "NVLink; one 100 Gb/s adapter per GPU"),
    Gpu("rtx4090", "GeForce RTX 4090", 24, 1008, 32, 3.1, _ADA_PAPER, "PCIe 4.0 x16; 25 Gb/s per GPU"),
    Gpu("mi300x", "Instinct MI300X", 192, 5300, 448, 50, "AMD Instinct MI300X data sheet", _XGMI),
)

#: The known GPUs by their name for ``--gpu``.
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}


def find_gpu(name: str) -> Gpu:
    """Return the GPU called ``name``.

    Raises:
        UserError: If the name is unknown. The message suggests the nearest one.
    """
    found = GPUS.get(name.lower())
    if found is None:
        kinds = [f"'{known}'" for known in GPUS if known.startswith(f"{name.lower()}-")]
        hint = f"; did you mean {' or '.join(kinds)}?" if kinds else nearest(name.lower(), GPUS)
        raise UserError(f"--gpu (or cluster.gpu) {name}: unknown GPU{hint} (known: {', '.join(GPUS)})")
    return found


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of a step. ``exposed`` is the part of ``communication`` that does not overlap computation."""

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
    """Return the estimated time of a step.

    Args:
        costs: Costs of one micro-batch.
        micros: Micro-batches per step.
        tf32: Whether float32 matrix products use TF32.
        gpu: The GPU.
        transfers: The collectives of a step.
        local: Number of elements that the rank's optimizer updates.
        ema: Number of elements of averaged weights that the rank updates.
        gathers_in_forward: Whether communication overlaps all forward and backward passes, and not only the last
            backward pass.
    """
    forward, backward = (_pass_time(part, gpu, tf32) for part in (costs.forward, costs.backward))
    compute = micros * (forward + backward)
    optimizer = (_ADAMW * local + _EMA * ema) / (MEMORY * gpu.bandwidth * 1e9)
    hidden = [_transfer_time(t, gpu) for t in transfers if t.overlapped]
    open_ = [_transfer_time(t, gpu) for t in transfers if not t.overlapped]
    # the last call of each overlapped collective cannot overlap anything
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
