"""What can only be seen on a GPU: NCCL, bf16 autocast, compile, FSDP2, pinned asynchronous saves, resuming.

One GPU is enough; without one all of it skips. The scans run in plain PyTorch here (``MMTRAIN_SCAN=parallel``), so that
the tests are about training and not about kernels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mmtrain.config import load_config
from mmtrain.inference.trained import load_trained
from mmtrain.train.loop import Outcome
from mmtrain.train.session import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: torch sees no GPU here"),
]
STEPS = 12


@pytest.fixture(autouse=True)
def plain_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTRAIN_SCAN", "parallel")


@pytest.fixture
def gpu_vision(tmp_path: Path) -> Path:
    """A small ViM2 on made-up images, with all that is random on."""
    path = tmp_path / "gpu.yaml"
    path.write_text(f"""
model: {{name: vim2_nano, num_classes: 10, dims: [16, 32], token_mixers: [2, 2], channel_expand: [2, 1],
        drop_path: 0.2}}
data: {{kind: synthetic, image_size: 16, length: 512, val_length: 96}}
task: {{kind: classification, mixup: 0.2, cutmix: 0.5}}
optim: {{lr: 3.0e-3}}
train: {{max_steps: {STEPS}, batch_size: 32, accumulation: 2, ema_decay: 0.9, log_every: 1, tf32: false}}
eval: {{every_steps: 6}}
device: cuda
""")
    return path


def run(config: Path, folder: Path, *overrides: str) -> Outcome:
    return train(load_config(config, overrides), folder)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_gpu_learns_what_a_cpu_learns(gpu_vision: Path, tmp_path: Path) -> None:
    run(gpu_vision, tmp_path / "gpu")
    run(gpu_vision, tmp_path / "cpu", "device=cpu")
    # float32 sums in another order: a relative 1e-6 a step, which Adam's first steps amplify
    torch.testing.assert_close(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_nccl_and_fully_sharded_equal_one_process(gpu_vision: Path, tmp_path: Path, strategy: str) -> None:
    run(gpu_vision, tmp_path / "one")
    run(gpu_vision, tmp_path / "split", f"parallel.strategy={strategy}")
    torch.testing.assert_close(losses(tmp_path / "split"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close(gpu_vision: Path, tmp_path: Path, precision: str) -> None:
    run(gpu_vision, tmp_path / "full")
    run(gpu_vision, tmp_path / "half", f"train.precision={precision}")
    # 8 bits of mantissa: a few per mille a layer, over a dozen mixers and steps
    torch.testing.assert_close(losses(tmp_path / "half"), losses(tmp_path / "full"), rtol=0.05, atol=0.05)
    assert all(w.dtype == torch.float32 for w in load_trained(tmp_path / "half", "last").model.state_dict().values())


def test_gathering_in_bf16(gpu_vision: Path, tmp_path: Path) -> None:
    run(gpu_vision, tmp_path / "one", "train.precision=bf16")
    run(gpu_vision, tmp_path / "split", "train.precision=bf16", "parallel.strategy=fsdp", "parallel.gather=bf16")
    torch.testing.assert_close(losses(tmp_path / "split"), losses(tmp_path / "one"), rtol=0.03, atol=0.03)


@pytest.mark.slow
def test_compiled_mixers_equal_eager_ones(gpu_vision: Path, tmp_path: Path) -> None:
    run(gpu_vision, tmp_path / "eager", "train.max_steps=4")
    run(gpu_vision, tmp_path / "compiled", "train.max_steps=4", "train.compile=true")
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strategy", ["none", "fsdp"])
def test_a_run_resumes_on_the_gpu(gpu_vision: Path, tmp_path: Path, strategy: str) -> None:
    """From an asynchronous checkpoint, staged in pinned memory; with deterministic algorithms, to the same bits."""
    options = [f"parallel.strategy={strategy}", "checkpoint.keep=100", "train.deterministic=true"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(gpu_vision, whole, *options)
    shutil.copytree(whole, broken)
    (broken / "result.json").unlink()
    for path in (broken / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > STEPS // 2:
            shutil.rmtree(path)
    run(gpu_vision, broken, *options)
    a, b = (load_trained(folder, "last").model.state_dict() for folder in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_zero_under_deepspeed(gpu_vision: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run(gpu_vision, tmp_path / "one")
    run(gpu_vision, tmp_path / "zero", "parallel.strategy=zero2")
    torch.testing.assert_close(losses(tmp_path / "zero"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-5)


def test_metrics_tell_of_the_gpu(gpu_vision: Path, tmp_path: Path) -> None:
    run(gpu_vision, tmp_path / "run", "train.profile=3:4")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["memory_peak_gib"] > 0
    assert last["tflops"] > 0
    parts = ("data", "forward", "backward", "optimizer", "communication", "other")
    assert sum(last[f"{part}_seconds"] for part in parts) == pytest.approx(last["step_seconds"], rel=0.02)
    assert list((tmp_path / "run" / "profile").glob("memory_*.pickle"))
