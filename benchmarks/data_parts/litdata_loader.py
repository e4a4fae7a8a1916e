"""LitData's loader of JPEG files, with Pillow and torchvision's transforms. It is skipped if it is not installed."""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmtrain.torchvision_compat import ensure_torchvision

SIZE, CLASSES = 224, 10
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def is_here() -> bool:
    if importlib.util.find_spec("litdata") is not None:
        return True
    print("LitData is skipped, because it is not installed (pip install litdata)", flush=True)
    return False


class _Augmented:
    """Transform of LitData's items. Each worker process imports torchvision itself."""

    steps: Any = None

    def __call__(self, item: dict[str, Any]) -> tuple[torch.Tensor, int]:
        if self.steps is None:
            ensure_torchvision()
            from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

            self.steps = Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)])
        return self.steps(Image.open(io.BytesIO(item["image"])).convert("RGB")), item["label"]


def _item(numbered: tuple[int, bytes]) -> dict[str, Any]:
    return {"image": numbered[1], "label": numbered[0] % CLASSES}


def open_litdata(folder: Path, files: list[bytes], workers: int, batch: int) -> Any:
    """Return a loader with persistent workers; each iteration is one epoch."""
    import litdata

    method = multiprocessing.get_start_method()
    litdata.optimize(_item, list(enumerate(files)), str(folder), chunk_bytes="16MB", num_workers=1)
    multiprocessing.set_start_method(method, force=True)  # litdata has changed it for the whole process
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, transform=_Augmented())
    return litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
