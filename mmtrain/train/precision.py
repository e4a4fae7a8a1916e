"""Number formats: autocast, the loss scale of fp16, TF32, deterministic algorithms, and the seed of each step."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from mmtrain.config import TrainConfig
from mmtrain.data.order import mix64

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """What autocast narrows to; None without autocast."""
    return _DTYPES.get(config.precision)


def set_up_arithmetic(config: TrainConfig) -> None:
    """TF32 for float32 matrix products on GPUs that have it, and deterministic algorithms where asked for."""
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set the global generators of torch, numpy and Python from (seed, step, rank).

    Nothing of ours draws from them. Code that does is then the same after a restart, with no state to save.
    """
    value = int(mix64(seed, step, rank)[0])
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


class LossScale:
    """fp16 loses small gradients: the loss is multiplied by ``value`` before the backward pass, the gradient divided.

    ``value`` halves after a step that overflowed, which is left out, and doubles after ``grow_after`` good ones. It is
    1 and stays so where it is not needed.
    """

    grow_after = 2000

    def __init__(self, config: TrainConfig) -> None:
        self.used = config.precision == "fp16"
        self.value = 2.0**15 if self.used else 1.0
        self.good = 0

    def update(self, finite: bool) -> bool:
        """Note a step; True when an overflow was the scale's fault, so that a smaller one may cure it."""
        if not self.used:
            return False
        if finite:
            self.good += 1
            if self.good == self.grow_after:
                self.value, self.good = self.value * 2, 0
            return False
        self.value, self.good = self.value / 2, 0
        return self.value >= 1.0
