"""Count the floating-point operations of training, and compare them with the peak of the GPU (MFU).

Peak rates of matrix products are from the manufacturers' data sheets.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config import ForecasterConfig, RunConfig
from mmtrain.config.data import ImageDataConfig
from mmtrain.errors import UserError
from mmtrain.models import build_model, example_inputs
from mmtrain.ops.backend import scan_backend

#: Dense peak of one GPU in 10¹² FLOP/s, by the name that the driver reports: (pattern, peaks by precision). fp16 and
#: bf16 accumulate in fp32. If a data sheet gives only the figure with sparsity (marked *), the entry is half of it.
#:
#: NVIDIA: H100 Tensor Core GPU data sheet (SXM 1979*, PCIe 1513*, NVL 1671*), H200 data sheet (SXM 1979*, NVL 1671*),
#: A100 data sheet, L40S data sheet, V100 data sheet (SXM2 125, PCIe 112, V100S 130), Ada GPU architecture whitepaper
#: (RTX 4090), HGX B200 data sheet (4.5* PFLOP/s a GPU). AMD: Instinct MI300X data sheet.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"B200", {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75}),
    (r"H200", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.7, "fp32": 67}),
    (r"H200 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.7, "fp32": 60}),
    (r"H100 80GB HBM3", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.7, "fp32": 67}),
    (r"H100 PCIe", {"bf16": 756.5, "fp16": 756.5, "tf32": 378, "fp32": 51}),
    (r"H100 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.7, "fp32": 60}),
    (
        r"A100-SXM4-[48]0GB|A100-PCIE-40GB|A100 80GB PCIe",
        {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    ),
    (r"L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    # The tensor cores of V100 support neither bfloat16 nor TF32: fp32 runs as fp32, also with train.tf32.
    (r"V100-SXM2-(16|32)GB", {"fp16": 125, "tf32": 15.7, "fp32": 15.7}),
    (r"V100-PCIE-(16|32)GB", {"fp16": 112, "tf32": 14, "fp32": 14}),
    (r"V100S-PCIE-32GB", {"fp16": 130, "tf32": 16.4, "fp32": 16.4}),
    (r"GeForce RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    (r"Instinct MI300X", {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
)
_MAKERS = r"(NVIDIA|Tesla|AMD)?\s*(Tesla\s*)?"


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of dense matrix products on ``device``.

    None for a CPU, for a slice of a GPU (MIG), and for an unknown GPU.

    Args:
        precision: bf16, fp16, tf32 or fp32.
    """
    return peak_by_name(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_by_name(name: str, precision: str) -> float | None:
    """Return :func:`peak_flops` of the GPU that torch reports as ``name``.

    The whole name must match: "4090 Laptop GPU", "4090 D" and the slice "… MIG 1g.10gb" are different devices.
    """
    for pattern, peaks in _PEAKS:
        if re.fullmatch(f"{_MAKERS}({pattern})", name.strip(), re.IGNORECASE):
            peak = peaks.get(precision)
            return None if peak is None else peak * 1e12
    return None


def _convolution_backward(grad: torch.Size, x: torch.Size, weight: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Count the FLOPs of the backward pass of a convolution.

    The gradients of the input and of the weight each cost as much as the forward pass, if they are computed. torch's
    rule for the weight ignores groups, so a depthwise convolution is overestimated by a factor of its channels: it
    gives 184 GFLOP for a sample of vim2_base (224 × 224 pixels) instead of 95.
    """
    transposed, *_, wanted = rest[4:]
    return 2 * x[0] * math.prod(weight) * math.prod((x if transposed else grad)[2:]) * sum(wanted[:2])


#: Rules for FlopCounterMode that replace incorrect ones of torch, by operator. A rule gets shapes instead of tensors.
FLOP_RULES = {torch.ops.aten.convolution_backward: _convolution_backward}


_counted: dict[tuple[str, int, int], float] = {}


def sample_flops(config: RunConfig, variates: int | None = None) -> float:
    """Count the FLOPs of the forward and backward pass of one training sample. A multiply-add counts as 2.

    torch's FLOP counter runs on the meta device, which needs no memory. It counts matrix products, convolutions and
    selective scans (9·L·D·N + L·D forward, twice that backward). It does not count activations, gates, normalisation,
    the optimizer, or recomputation.

    Args:
        variates: number M of variates in a sample. Required for TSM2, ignored for ViM2.

    Raises:
        UserError: if the model does not accept the input, or if ``variates`` is missing.
    """
    if isinstance(config.model, ForecasterConfig) and variates is None:
        raise UserError(f"model '{config.model.name}': cannot count FLOPs without the number of variates of a sample")
    side = config.data.image_size if isinstance(config.data, ImageDataConfig) else 224
    key = (repr(config.model), side, variates or 1)
    if key not in _counted:
        _counted[key] = _count(config, side, variates or 1)
    return _counted[key]


def _count(config: RunConfig, side: int, variates: int) -> float:
    """Count the FLOPs of one sample, without the cache of :func:`sample_flops`. ``side``: image size in pixels."""
    batch = 2
    with torch.device("meta"):
        # In eval mode, dropout and drop path need no sample keys. They do not change the count.
        model = build_model(config.model).eval()
        inputs = example_inputs(config.model, batch=batch, image_size=(side, side), variates=variates)
    outputs: list[torch.Tensor] = []
    spread = getattr(model, "spread", None)  # TSM2 returns only the point forecast by default, but its loss uses both
    if spread is not None:
        spread.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        counter = FlopCounterMode(display=False, custom_mapping=FLOP_RULES)
        # Meta tensors have no values in which anomaly detection could find a NaN.
        no_anomalies = torch.autograd.set_detect_anomaly(False)
        # Only the backend "auto" has a FLOP rule, so a backend set in the environment is ignored here.
        with counter, no_anomalies, scan_backend("auto"), torch.enable_grad():
            outputs.append(model(*inputs))
            torch.stack([output.sum() for output in outputs]).sum().backward()
    except ValueError as error:
        raise UserError(f"model '{config.model.name}': {error}") from None
    return counter.get_total_flops() / batch


@dataclass(frozen=True)
class Utilization:
    """Converts samples per second into achieved FLOP/s of one rank.

    Attributes:
        flops: FLOPs of one training sample.
        peak: peak FLOP/s of the rank's device, or None if it is not known.
    """

    flops: float
    peak: float | None

    @classmethod
    def of_run(cls, config: RunConfig, device: torch.device, variates: int | None = None) -> Utilization:
        """Build from the model and the precision of ``config``. For ``variates`` see :func:`sample_flops`."""
        train = config.train
        precision = "tf32" if train.precision == "fp32" and train.tf32 else train.precision
        return cls(sample_flops(config, variates), peak_flops(device, precision))

    def line(self, samples_per_second: float) -> dict[str, float]:
        """Return the utilisation metrics of one rank.

        Args:
            samples_per_second: throughput of one rank.

        Returns:
            ``tflops``: achieved 10¹² FLOP/s. ``mfu``: fraction of the peak, 0 to 1, if the peak is known. The peak is
            for matrix products in the precision of the run. Selective scans compute in fp32 without matrix products,
            so they cannot reach it.
        """
        achieved = self.flops * samples_per_second
        line = {"tflops": achieved / 1e12}
        return line if self.peak is None else {**line, "mfu": achieved / self.peak}
