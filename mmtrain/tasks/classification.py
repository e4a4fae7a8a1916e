"""Image classification: cross-entropy with label smoothing, Mixup and CutMix; top-1 and top-5 accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import TASKS, ClassificationConfig, ImageDataConfig, ImageModelConfig, RunConfig
from mmtrain.data.core.order import mix64
from mmtrain.data.images.transforms import generators_kept
from mmtrain.data.open import open_images, other_classes
from mmtrain.errors import UserError
from mmtrain.log import logger
from mmtrain.plotting.runs import draw_confusion
from mmtrain.tasks import Batch, StepKey, Task
from mmtrain.torchvision_compat import ensure_torchvision

#: Maximum number of classes and of samples of a confusion matrix. One rank computes it while the others wait.
_DRAWN_CLASSES, _DRAWN_SAMPLES = 50, 1000


@TASKS.implements(ClassificationConfig)
class Classification(Task):
    """Image classification task. Top-1 accuracy selects the best checkpoint."""

    metric: ClassVar[str] = "top1"
    higher_is_better: ClassVar[bool] = True
    plotted: ClassVar[tuple[str, ...]] = ("top1",)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        if not isinstance(config.model, ImageModelConfig):
            raise UserError(
                f"task.kind=classification: model '{config.model.name}' takes no images. Use a ViM2 model, such as"
                " model=vim2_tiny"
            )
        self.options = cast(ClassificationConfig, config.task)
        self.num_classes = config.model.num_classes
        if not isinstance(config.data, ImageDataConfig):
            raise UserError(
                f"task.kind=classification: data.kind={config.data.kind} has no images. Use data=shards or data=ffcv"
            )
        self.train, self.val, self.test, self.classes = open_images(config.data, self.num_classes, config.seed)
        self.mixup = self._mixup()

    def _mixup(self) -> Any:
        if self.options.mixup == 0 and self.options.cutmix == 0:
            return None
        ensure_torchvision()
        from timm.data import Mixup

        return Mixup(
            self.options.mixup,
            self.options.cutmix,
            prob=self.options.mix_prob,
            label_smoothing=self.options.label_smoothing,
            num_classes=self.num_classes,
        )

    def check_batch(self, local: int) -> None:
        if self.mixup is not None and local % 2:
            raise UserError(
                f"Mixup and CutMix pair the samples of a micro-batch, but a rank has an odd number of them ({local})."
                " Change train.batch_size so that the number is even, or set task.mixup=0 task.cutmix=0"
            )

    def check_assets(self, assets: dict[str, Any], owner: str | Path) -> None:
        known, data = assets.get("classes"), self.config.data
        if not isinstance(known, list) or self.classes is None:
            return
        source = getattr(data, "root", data.kind)
        numbers = [str(number) for number in range(len(known))]  # assets contain numbers if the data had no class names
        if known == numbers and set(self.classes) != set(numbers):
            logger.warning("%s has no class names. The class names of %s are not checked", owner, source)
        elif found := other_classes(known, self.classes):
            raise UserError(
                f"{source} has other classes than {owner}: {found}. All metrics would be wrong, since the class numbers"
                " differ. Use data with the same classes in the same order (meta.json lists them)"
            )

    def loss(self, model: nn.Module, batch: Batch, key: StepKey) -> Tensor:
        images, labels = batch["image"], batch["label"]
        if self.mixup is None:
            return F.cross_entropy(model(images).float(), labels, label_smoothing=self.options.label_smoothing)
        images, targets = self._mix(images, labels, key)
        return F.cross_entropy(model(images).float(), targets)

    def _mix(self, images: Tensor, labels: Tensor, key: StepKey) -> tuple[Tensor, Tensor]:
        """Apply timm's Mixup or CutMix, with results that do not depend on the world size.

        Position p of the global batch B is paired with p + B/2, which is in the same micro-batch of the same rank. timm
        pairs i with -1-i, so the second half is reversed before the call.
        """
        half = len(images) // 2
        index = torch.arange(len(images), device=images.device)
        order = torch.cat([index[:half], index[half:].flip(0)])
        with generators_kept():
            np.random.seed(mix64(key.seed, key.step).item() % 2**32)  # timm uses NumPy's global generator
            mixed, targets = self.mixup(images[order], labels[order])
        back = torch.argsort(order)
        return mixed[back], targets[back]

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits, labels = model(batch["image"]).float(), batch["label"]
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        return {
            "count": torch.tensor(len(labels), dtype=torch.float64),
            "loss": F.cross_entropy(logits, labels, reduction="sum").double(),
            "top1": top[:, 0].sum().double(),
            "top5": top.any(1).sum().double(),
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        count = sums["count"]
        return {
            "loss": sums["loss"] / count,
            "top1": 100 * sums["top1"] / count,
            "top5": 100 * sums["top5"] / count,
            "samples": count,
        }

    @torch.no_grad()
    def illustrate(self, model: nn.Module, folder: Path) -> list[Path]:
        """Draw the confusion matrix of up to 1,000 samples of the test split, if there are at most 50 classes."""
        if self.test is None or self.num_classes > _DRAWN_CLASSES:
            return []
        # Take samples at equal distances, since the split may be sorted by class.
        count = min(len(self.test), _DRAWN_SAMPLES)
        index = np.arange(count) * len(self.test) // count
        device, size = next(model.parameters()).device, self.config.eval.batch_size
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        for begin in range(0, count, size):
            batch = self.test.fetch(index[begin : begin + size], None)
            predicted = model(batch["image"].to(device)).float().argmax(1).cpu()
            np.add.at(counts, (batch["label"].numpy(), predicted.numpy()), 1)
        path = folder / "confusion.png"
        of = "" if count == len(self.test) else f" of {len(self.test)}"
        draw_confusion(path, self.assets()["classes"], counts, f"{count}{of} samples of the test split")
        return [path]

    def assets(self) -> dict[str, Any]:
        data = cast(ImageDataConfig, self.config.data)
        return {
            "classes": self.classes or [str(i) for i in range(self.num_classes)],
            "image_size": data.image_size,
            "mean": data.mean,
            "std": data.std,
            "crop_pct": getattr(data, "crop_pct", 1.0),
        }
