"""Guards of the numbers of a step: non-finite values, loss spikes, fp16 loss scaling, and the search for the first NaN.

A step is skipped on every rank or on none. The ranks therefore decide together, in one small all-reduce.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmtrain.config import TrainConfig
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import to_local
from mmtrain.tasks import Batch
from mmtrain.train.state import TrainState

#: Number of consecutive finite steps after which the fp16 loss scale doubles.
_GROW_AFTER = 2000


@dataclass(frozen=True)
class Agreement:
    """Result of :func:`agree`, which follows the backward pass of a step. Equal on every rank.

    Attributes:
        loss: mean over ranks, or NaN if the loss of any rank is not finite.
        stop: some rank must stop.
        save: some rank requests a checkpoint.
        save_failed: an asynchronous save failed on some rank.
    """

    loss: float
    stop: bool
    save: bool
    save_failed: bool

    @property
    def finite(self) -> bool:
        """True if loss and gradient are finite on every rank."""
        return math.isfinite(self.loss)


def agree(ranks: Ranks, loss: float, *, stop: bool, save: bool, save_failed: bool) -> Agreement:
    """Exchange ``loss`` and the flags of this rank with all ranks. A flag is true if it is true on any rank.

    A collective: all ranks call it together.
    """
    finite = math.isfinite(loss)
    local = [loss if finite else 0.0, float(not finite), float(stop), float(save), float(save_failed)]
    total, broken, stops, saves, failures = ranks.sum(torch.tensor(local, dtype=torch.float64)).tolist()
    return Agreement(math.nan if broken else total / ranks.world, stops > 0, saves > 0, failures > 0)


def is_spike(config: TrainConfig, state: TrainState, loss: float) -> bool:
    """Return whether a finite ``loss`` exceeds ``spike_factor`` times the median of the last ``spike_window`` losses.

    A loss that is no spike is added to ``state.recent_losses``. Checkpoints contain this list, so a resumed run decides
    as an uninterrupted one. No step is a spike before ``spike_window`` losses are known.
    """
    if config.spike_factor is None:
        return False
    last = state.recent_losses
    if len(last) == config.spike_window and loss > config.spike_factor * statistics.median(last):
        return True
    state.recent_losses = [*last, loss][-config.spike_window :]
    return False


def initial_loss_scale(config: TrainConfig) -> float:
    """Return the initial loss scale: 2¹⁵ for fp16, whose small gradients would underflow, otherwise 1.

    The loss is multiplied by the scale before the backward pass, and the gradient is divided by it afterwards.
    """
    return 2.0**15 if config.precision == "fp16" else 1.0


def update_loss_scale(state: TrainState, config: TrainConfig, *, finite: bool) -> bool:
    """Halve the fp16 loss scale of ``state`` after an overflow, or double it after 2,000 consecutive finite steps.

    Returns:
        True if the step overflowed and a smaller scale may prevent it. False if the step is finite, if the precision is
        not fp16, or if the scale has fallen below 1.
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


def first_bad(model: nn.Module, loss: Callable[[Batch], Tensor], batches: list[Batch], ranks: Ranks) -> str:
    """Describe the first non-finite tensor. The text is the same on every rank.

    Checks the inputs, then the weights, then the output of each module during a forward pass, in order of execution.
    A collective: all ranks call it together.

    Args:
        loss: runs ``model`` once on a batch and returns the loss.
        batches: the micro-batches of the step. Every rank has the same number of them.
    """
    # Every rank runs all forward passes, because a forward pass can be a collective.
    outputs = [_bad_output(model, loss, batch) for batch in batches]
    found = [*map(_bad_input, batches), _bad_weight(model), *outputs]
    for rank, fault in enumerate(ranks.gather(next((fault for fault in found if fault is not None), None))):
        if fault is not None:
            return fault if ranks.world == 1 else f"rank {rank}: {fault}"
    return "the forward pass is finite on every rank: the overflow is in the backward pass"


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _bad_input(batch: Batch) -> str | None:
    """Describe the first input that is not finite, with the samples concerned."""
    for name, tensor in batch.items():
        if is_finite(tensor):
            continue
        rows = [i for i, row in enumerate(tensor) if not is_finite(row)]
        samples = batch["index"][rows].tolist() if "index" in batch else rows
        return f"the input '{name}' of the samples {', '.join(map(str, samples[:8]))} is not finite"
    return None


def _bad_weight(model: nn.Module) -> str | None:
    bad = (name for name, parameter in model.named_parameters() if not is_finite(to_local(parameter.detach())))
    return next((f"the weight {name} is not finite" for name in bad), None)


@torch.no_grad()
def _bad_output(model: nn.Module, loss: Callable[[Batch], Tensor], batch: Batch) -> str | None:
    """Run a forward pass and describe the first module whose output is not finite."""
    first: list[str] = []

    def check_output_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            if not first and not all(is_finite(t) for t in tensors):
                first.append(f"the output of module {name or 'the model'} ({type(module).__name__}) is not finite")

        return hook

    hooks = [module.register_forward_hook(check_output_of(name)) for name, module in model.named_modules()]
    try:
        value = loss(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if first:
        return first[0]
    return None if is_finite(value) else "the loss is not finite, although the output of the model is"
