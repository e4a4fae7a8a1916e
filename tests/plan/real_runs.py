"""Real training on the CPU, to hold plans against: run as programs, each in a process of its own.

``alone``: one process trains as ``parallel.strategy=none`` does; prints what its tensors hold and by how much its
memory grew. ``sharded``: one of the processes of a gloo group, with FSDP2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtrain.config import ParallelConfig, RunConfig, load_config
from mmtrain.config.models import preset
from mmtrain.models import build_model
from mmtrain.train.optim import build_optimizer

#: 24 M parameters (vim2_tiny) on 32 × 32 pixels: the state is large beside all that is not planned.
OVERRIDES = [
    "data=synthetic",
    "data.image_size=32",
    "train.batch_size=2",
    "train.precision=fp32",
    "train.ema_decay=null",
    "task.mixup=0",
    "task.cutmix=0",
]
CONFIG = "vim2_tiny_in1k"


def settings(model: str = "vim2_tiny") -> RunConfig:
    return load_config(CONFIG, [*OVERRIDES, f"model={model}"])


def peak_rss() -> int:
    """Bytes: the high-water mark of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def local_bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in (getattr(t, "_local_tensor", t) for t in tensors))


def steps(model: nn.Module, config: RunConfig, samples: int, size: int, count: int = 3) -> dict[str, int]:
    """Train on zeros; bytes held by parameters, gradients and moments after the last backward pass."""
    optimizer = build_optimizer(model, config.optim)
    held: dict[str, int] = {}
    for _ in range(count):
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(torch.zeros(samples, 3, size, size)), torch.zeros(samples).long())
        loss.backward()
        parameters = list(model.parameters())
        states = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        held = {
            "weights": local_bytes(parameters),
            "gradients": local_bytes(p.grad for p in parameters if p.grad is not None),
            "optimizer": local_bytes(states),
        }
        optimizer.step()
    return held


def alone() -> dict[str, int]:
    config = settings()
    steps(build_model(preset("vim2_nano")).train(), config, 1, 16)  # everything is imported and loaded
    before = peak_rss()
    held = steps(build_model(config.model).train(), config, 2, 32)
    return {**held, "grown": peak_rss() - before}


def sharded() -> dict[str, int]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from mmtrain.models.averaging import model_blocks
    from mmtrain.parallel.fsdp import apply_fsdp

    dist.init_process_group("gloo")
    config = settings("vim2_micro")
    model = build_model(config.model).train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    apply_fsdp(model, model_blocks(model), mesh, ParallelConfig(strategy="fsdp"))
    held = steps(model, config, 1, 32, count=2)
    dist.destroy_process_group()
    return held


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"alone": alone, "sharded": sharded}[sys.argv[1]]()
    print(json.dumps({"rank": int(os.environ.get("RANK", 0)), **found}))
