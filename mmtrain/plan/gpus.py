"""GPUs as their makers describe them. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU.

    ``bf16``, ``fp16``, ``tf32``: dense matrix products, without sparsity, in TFLOP/s; where there is no unit for a
    format, its rate is that of ``fp32``. ``fp32``: the vector units, TFLOP/s. ``memory``: GiB. ``bandwidth``: of that
    memory, GB/s. ``intra``: to the other GPUs of a node, ``inter``: to other nodes; GB/s for one GPU and one direction.
    ``source``: where the figures of the chip are from. The links of a node are a choice of who builds it: ``links``
    says which we assume.
    """

    name: str
    bf16: float
    fp16: float
    tf32: float
    fp32: float
    memory: float
    bandwidth: float
    intra: float
    inter: float
    source: str
    links: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory * 2**30)

    def matrix_rate(self, dtype: str, tf32: bool) -> float:
        """FLOP/s of matrix products of operands of ``dtype`` (bfloat16, float16 or float32)."""
        rates = {"bfloat16": self.bf16, "float16": self.fp16}
        return 1e12 * rates.get(dtype, self.tf32 if tf32 else self.fp32)


_HGX = "NVLink; a 400 Gb/s adapter a GPU"
_TABLE = (
    Gpu(
        *("h100", 989.4, 989.4, 494.7, 66.9, 80, 3350, 450, 50),
        source="NVIDIA H100 Tensor Core GPU data sheet (SXM5)",
        links=_HGX,
    ),
    Gpu(
        *("h200", 989.4, 989.4, 494.7, 66.9, 141, 4800, 450, 50),
        source="NVIDIA H200 Tensor Core GPU data sheet (SXM)",
        links=_HGX,
    ),
    Gpu(
        *("b200", 2250, 2250, 1125, 75, 180, 7700, 900, 50),
        source="NVIDIA HGX platform, B200 (an eighth of the board)",
        links=_HGX,
    ),
    Gpu(
        *("a100-80gb", 312, 312, 156, 19.5, 80, 2039, 300, 25),
        source="NVIDIA A100 Tensor Core GPU data sheet (SXM4, 80 GB)",
        links="NVLink; a 200 Gb/s adapter a GPU",
    ),
    Gpu(
        *("a100-40gb", 312, 312, 156, 19.5, 40, 1555, 300, 25),
        source="NVIDIA A100 Tensor Core GPU data sheet (SXM4, 40 GB)",
        links="NVLink; a 200 Gb/s adapter a GPU",
    ),
    Gpu(
        *("l40s", 362, 362, 183, 91.6, 48, 864, 32, 12.5),
        source="NVIDIA L40S data sheet",
        links="PCIe 4.0 x16; a 200 Gb/s adapter for two GPUs",
    ),
    Gpu(
        *("v100", 15.7, 125, 15.7, 15.7, 32, 900, 150, 12.5),
        source="NVIDIA V100 data sheet (SXM2, 32 GB); it has no bf16 and no TF32 units",
        links="NVLink; a 100 Gb/s adapter a GPU",
    ),
    Gpu(
        *("rtx4090", 165.2, 165.2, 82.6, 82.6, 24, 1008, 32, 3.1),
        source="NVIDIA Ada GPU architecture white paper (products with fp32 accumulation)",
        links="PCIe 4.0 x16; 25 Gb/s a GPU",
    ),
    Gpu(
        *("mi300x", 1307.4, 1307.4, 653.7, 163.4, 192, 5300, 448, 50),
        source="AMD Instinct MI300X data sheet",
        links="Infinity Fabric, 7 links; a 400 Gb/s adapter a GPU",
    ),
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
