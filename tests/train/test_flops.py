"""FLOPs of a training sample against counts by hand; the peaks of GPUs by their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmtrain.config import RunConfig, SyntheticDataConfig, TSM2Config, ViM2Config
from mmtrain.config.models import preset
from mmtrain.errors import UserError
from mmtrain.train import flops
from mmtrain.train.flops import Utilization, peak_by_name, peak_flops, sample_flops


def linear(rows: int, inside: int, out: int) -> int:
    """One multiply-add for each row, input and output."""
    return 2 * rows * inside * out


def scan(length: int, width: int, state: int, rank: int) -> int:
    """B, C and the low-rank step from the input, the step itself, and the scan."""
    projections = linear(length, width, rank + 2 * state) + linear(length, rank, width)
    return projections + 9 * length * width * state + length * width


@pytest.fixture(autouse=True)
def _counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_counted", {})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tsm2_by_hand(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever backend the environment asks for; twice the variates are another count."""
    monkeypatch.setenv("MMTRAIN_SCAN", backend)
    model = TSM2Config(name="tsm2", lookback=40, horizon=5, patch_size=16, patch_stride=8, dim=8, depth=1, state=3)
    for variates in (3, 6):
        patches, width, taps = 4, 16, 4
        positions = variates * patches
        embed = linear(positions, 16, 8)
        projections = linear(positions, 8, 2 * width) + linear(positions, width, 8)
        one_way = scan(positions, width, 3, rank=1) + 2 * positions * width * taps
        time, variate = projections + one_way, projections + 2 * one_way
        head = linear(variates, patches * 8, 5)
        # twice the forward pass for the gradients, but the data takes none
        expected = 2 * embed + 3 * (time + variate + head)
        assert sample_flops(RunConfig(model=model), variates) == expected


def test_what_a_spread_adds_is_trained_too() -> None:
    sizes = {"lookback": 32, "horizon": 5, "dim": 8, "depth": 1}
    point, quantiles, student = (
        sample_flops(RunConfig(model=TSM2Config(name="tsm2", output=output, **sizes)), 2)  # type: ignore[arg-type]
        for output in ("point", "quantiles", "student_t")
    )
    assert quantiles - point == 3 * linear(2, 3 * 8, 5 * 3)
    assert student - point == 3 * linear(2, 3 * 8, 5 * 2)


def test_vim2_by_hand() -> None:
    """Of the configured image size. The depthwise convolution must not be counted as a dense one."""
    model = ViM2Config(
        name="vim2", num_classes=7, patch_size=2, dims=[8], token_mixers=[2], channel_expand=[1], state=4
    )
    model.channel_mixer, model.drop_path = "none", 0.3
    for side in (12, 8):
        tokens, width = (side // 2) ** 2, 16
        stem = linear(tokens, 3 * 2 * 2, 8)
        mixer = linear(tokens, 8, 2 * width) + linear(tokens, width, 8) + 2 * tokens * width * 9
        mixer += 4 * scan(tokens, width, 4, rank=1)
        config = RunConfig(model=model, data=SyntheticDataConfig(image_size=side))
        assert sample_flops(config) == 2 * stem + 3 * (2 * mixer + linear(1, 8, 7))


def test_recomputation_is_not_counted() -> None:
    config = RunConfig(model=preset("vim2_nano"), data=SyntheticDataConfig(image_size=32))
    plain = sample_flops(config)
    config.train.checkpointing = "full"
    flops._counted.clear()
    assert sample_flops(config) == plain


def test_the_model_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(model=preset("vim2_nano"), data=SyntheticDataConfig(image_size=16))
    first = sample_flops(config)
    monkeypatch.setattr("mmtrain.train.flops.build_model", lambda config: nn.Identity())
    assert sample_flops(config) == first


def test_what_cannot_be_counted_is_said() -> None:
    with pytest.raises(UserError, match="number of variates"):
        sample_flops(RunConfig(model=TSM2Config(name="tsm2")))
    small = RunConfig(model=preset("vim2_nano"), data=SyntheticDataConfig(image_size=1))
    with pytest.raises(UserError, match="at least 2×2"):
        sample_flops(small)


# ------------------------------------------------------------------ peaks and utilization


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 PCIe", "fp32", 51),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA L40S", "fp16", 362),
        ("NVIDIA B200", "bf16", 2250),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # it has none
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        # other machines, whose names hold a known one
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA H20", "bf16", None),
    ],
)
def test_peaks_by_name(name: str, precision: str, tflops: float | None) -> None:
    assert peak_by_name(name, precision) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_cpu_has_no_peak_and_so_no_mfu() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None
    config = RunConfig(model=preset("vim2_nano"), data=SyntheticDataConfig(image_size=32))
    utilization = Utilization.of_run(config, torch.device("cpu"))
    assert utilization.line(100) == {"tflops": pytest.approx(sample_flops(config) * 1e-10)}


def test_mfu_is_the_share_of_the_peak_of_the_runs_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    config = RunConfig(model=preset("vim2_nano"), data=SyntheticDataConfig(image_size=32))
    achieved = sample_flops(config) * 1000
    for precision, tf32, peak in (("bf16", True, 312e12), ("fp32", True, 156e12), ("fp32", False, 19.5e12)):
        config.train.precision, config.train.tf32 = precision, tf32
        line = Utilization.of_run(config, torch.device("cuda", 0)).line(1000)
        assert line["mfu"] == pytest.approx(achieved / peak)
        assert line["tflops"] == pytest.approx(achieved / 1e12)
