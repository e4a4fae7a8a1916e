"""Floating-point operations of a training step, and their share of the GPU's peak (MFU).

The peak rates of matrix products are from the makers' data sheets.
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

#: Dense 10¹² FLOP/s of one GPU, by the name that the driver gives: (pattern, peaks by precision). fp16 and bf16
#: accumulate in fp32. Where a data sheet gives only the figure with sparsity (marked *), this is half of it.
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
    # no bfloat16 and no TF32 on its tensor cores: fp32 runs as fp32, whatever is asked for
    (r"V100-SXM2-(16|32)GB", {"fp16": 125, "tf32": 15.7, "fp32": 15.7}),
    (r"V100-PCIE-(16|32)GB", {"fp16": 112, "tf32": 14, "fp32": 14}),
    (r"V100S-PCIE-32GB", {"fp16": 130, "tf32": 16.4, "fp32": 16.4}),
    (r"GeForce RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    (r"Instinct MI300X", {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
)
_MAKERS = r"(NVIDIA|Tesla|AMD)?\s*(Tesla\s*)?"


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of dense matrix products on ``device``; None for a CPU, a part of a GPU (MIG) or an unknown GPU.

    Args:
        precision: bf16, fp16, tf32 or fp32.
    """
    return peak_by_name(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_by_name(name: str, precision: str) -> float | None:
    """As :func:`peak_flops`, for the name that torch gives to a GPU.

    The whole name must fit: a "4090 Laptop GPU", a "4090 D" and a slice "… MIG 1g.10gb" are other machines.
    """
    for pattern, peaks in _PEAKS:
        if re.fullmatch(f"{_MAKERS}({pattern})", name.strip(), re.IGNORECASE):
            peak = peaks.get(precision)
            return None if peak is None else peak * 1e12
    return None


def _convolution_backward(grad: torch.Size, x: torch.Size, weight: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """The gradient of the input and that of the weight, if wanted, cost as much as the forward pass each.

    torch's own rule counts the weight's gradient without regard to groups. For a depthwise convolution that is too much
    by the number of channels: it would put vim2_base at 184 GFLOP a sample of 224 × 224 pixels, which takes 95.
    """
    transposed, *_, wanted = rest[4:]
    return 2 * x[0] * math.prod(weight) * math.prod((x if transposed else grad)[2:]) * sum(wanted[:2])


#: Our rules for FlopCounterMode, by operator, where torch's own miscount. They take shapes in place of tensors.
FLOP_RULES = {torch.ops.aten.convolution_backward: _convolution_backward}


_counted: dict[tuple[str, int, int], float] = {}


def sample_flops(config: RunConfig, variates: int | None = None) -> float:
    """Operations of the forward and the backward pass for one training sample, 2 to a multiply-add.

    Counted on the meta device, which takes no memory, by torch's counter: matrix products, convolutions and the
    selective scans, 9·L·D·N + L·D forward and twice that backward. Left out are activations, gates, normalisation and
    the optimizer. What activation checkpointing computes again is not counted, whatever the configuration says.

    Args:
        variates: the number M of series in a sample; needed for TSM2 (its data knows it), not for ViM2.

    Raises:
        UserError: for a model that cannot be counted, or an input that it cannot take.
    """
    if isinstance(config.model, ForecasterConfig) and variates is None:
        raise UserError(f"model '{config.model.name}': the FLOPs of a sample need its number of variates")
    side = config.data.image_size if isinstance(config.data, ImageDataConfig) else 224
    key = (repr(config.model), side, variates or 1)
    if key not in _counted:
        _counted[key] = _count(config, side, variates or 1)
    return _counted[key]


def _count(config: RunConfig, side: int, variates: int) -> float:
    batch = 2
    with torch.device("meta"):
        # eval: dropout and drop path want the samples' keys, and change no count
        model = build_model(config.model).eval()
        inputs = example_inputs(config.model, batch=batch, image_size=(side, side), variates=variates)
    outputs: list[torch.Tensor] = []
    spread = getattr(model, "spread", None)  # TSM2 returns the point alone, unless asked: its loss needs both
    if spread is not None:
        spread.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        # the kernel's own rule for the FLOPs, whatever backend the environment asks for
        counter = FlopCounterMode(display=False, custom_mapping=FLOP_RULES)
        # nothing to detect, and no values to look at, when a debug run looks for anomalies
        calm = torch.autograd.set_detect_anomaly(False)
        with counter, calm, scan_backend("auto"), torch.enable_grad():
            outputs.append(model(*inputs))
            torch.stack([output.sum() for output in outputs]).sum().backward()
    except ValueError as error:
        raise UserError(f"model '{config.model.name}': {error}") from None
    return counter.get_total_flops() / batch


@dataclass(frozen=True)
class Utilization:
    """From samples a second to achieved operations a second of one rank.

    ``flops``: of one training sample. ``peak``: of the rank's device, FLOP/s; None where it is not known.
    """

    flops: float
    peak: float | None

    @classmethod
    def of_run(cls, config: RunConfig, device: torch.device, variates: int | None = None) -> Utilization:
        """Of the model and the precision of ``config`` on ``device``; for ``variates`` see :func:`sample_flops`."""
        train = config.train
        precision = "tf32" if train.precision == "fp32" and train.tf32 else train.precision
        return cls(sample_flops(config, variates), peak_flops(device, precision))

    def line(self, samples_per_second: float) -> dict[str, float]:
        """For a line of metrics.

        Args:
            samples_per_second: of one rank.

        Returns:
            ``tflops``: achieved 10¹² FLOP/s of a rank; ``mfu``: their share of the peak, 0 to 1, where that is known.
            The peak is that of matrix products in the run's precision: the scans, which compute in fp32 and are no
            matrix products, cannot reach it.
        """
        achieved = self.flops * samples_per_second
        line = {"tflops": achieved / 1e12}
        return line if self.peak is None else {**line, "mfu": achieved / self.peak}
