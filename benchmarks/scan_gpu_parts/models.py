"""Training images per second of ViM2-T at 224 and of timm's Swin-T: forward, backward and step of AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from scan_gpu_parts.measure import seconds


def networks(smoke: bool) -> dict[str, Callable[[], nn.Module]]:
    """Return functions that build the models, by name."""
    from mmtrain.models import create_model
    from mmtrain.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    import timm

    if smoke:
        return {"vim2_nano": lambda: create_model("vim2_nano", num_classes=10)}
    return {
        "vim2_tiny": lambda: create_model("vim2_tiny", num_classes=1000),
        "swin_tiny": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=1000),
    }


def images_per_second(
    model: nn.Module, batch: int, size: int, classes: int, device: torch.device, compiled: bool
) -> float:
    """Return the training images per second; on a GPU with bf16 autocast and float32 parameters."""
    model = model.to(device).train()
    step = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    x = torch.randn(batch, 3, size, size, device=device)
    y = torch.randint(classes, (batch,), device=device)

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(step(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batch / seconds(train, device, budget=10.0, most=30)


def measure(device: torch.device, batch: int, smoke: bool) -> list[dict[str, object]]:
    """Return one row per model, compiled and not. Models that fail are skipped with a message."""
    rows: list[dict[str, object]] = []
    for name, make in networks(smoke).items():
        for compiled in (False,) if smoke else (False, True):
            size, classes = (16, 10) if smoke else (224, 1000)
            count = 2 if smoke else batch
            try:
                rate = images_per_second(make(), count, size, classes, device, compiled)
            except Exception as error:
                print(f"  {name}, compiled={compiled}: {type(error).__name__}: {error}"[:400])
                continue
            rows.append({"model": name, "compiled": compiled, "batch": count, "images_per_s": rate})
    return rows
