"""Peak rates of matrix products by GPU, from the makers' data sheets."""

from __future__ import annotations

import re

import torch

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
