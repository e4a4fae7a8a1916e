"""Number formats: autocast, the loss scale of fp16, TF32, deterministic algorithms, and the seed of each step."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from mmtrain.config import TrainConfig
from mmtrain.data.core.order import mix64
from mmtrain.train.state import TrainState

#: Good steps in a row after which the loss scale of fp16 doubles.
_GROW_AFTER = 2000
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
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # torch.manual_seed would note the call for later, with a traceback, every step
        torch.cuda.manual_seed_all(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def initial_loss_scale(config: TrainConfig) -> float:
    """What the loss is multiplied by before the backward pass, and the gradient divided by: fp16 loses small ones."""
    return 2.0**15 if config.precision == "fp16" else 1.0


def update_loss_scale(state: TrainState, config: TrainConfig, *, finite: bool) -> bool:
    """Note a step in ``state``: the scale halves after an overflow and doubles after 2,000 good steps.

    Returns:
        True when an overflow was the scale's fault, so that a smaller one may cure it.
    """
    if config.precision != "fp16":
        return False
    if finite:
        state.good_in_a_row += 1
        if state.good_in_a_row == _GROW_AFTER:
            state.loss_scale, state.good_in_a_row = state.loss_scale * 2, 0
        return False
    state.loss_scale, state.good_in_a_row = state.loss_scale / 2, 0
    return state.loss_scale >= 1.0
