"""What is done about numbers that go wrong: ranks agree on a step, spikes are found, fp16 is rescaled, NaN is traced.

A step is left out on every rank or on none, so its loss and its gradient are judged together, in one small all-reduce.
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

#: Good steps in a row after which the loss scale of fp16 doubles.
_GROW_AFTER = 2000


@dataclass(frozen=True)
class Agreement:
    """The same on every rank. ``loss``: the mean over ranks; NaN when it is not finite on some rank."""

    loss: float
    stop: bool
    save: bool
    save_failed: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


def agree(ranks: Ranks, loss: float, *, stop: bool, save: bool, save_failed: bool) -> Agreement:
    """Share this rank's ``loss`` and wishes: one rank's wish to stop or save is everybody's."""
    finite = math.isfinite(loss)
    mine = [loss if finite else 0.0, float(not finite), float(stop), float(save), float(save_failed)]
    total, broken, stops, saves, failures = ranks.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
    return Agreement(math.nan if broken else total / ranks.world, stops > 0, saves > 0, failures > 0)


def is_spike(config: TrainConfig, state: TrainState, loss: float) -> bool:
    """Whether ``loss`` (finite) is above ``spike_factor`` times the median of the last ``spike_window`` steps.

    Otherwise it is noted in ``state``, and so in every checkpoint: a run that is started again must judge as one that
    was not. The first ``spike_window`` steps are only noted: there is nothing to compare them with.
    """
    if config.spike_factor is None:
        return False
    last = state.recent_losses
    if len(last) == config.spike_window and loss > config.spike_factor * statistics.median(last):
        return True
    state.recent_losses = [*last, loss][-config.spike_window :]
    return False


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


def first_bad(model: nn.Module, loss: Callable[[Batch], Tensor], batches: list[Batch], ranks: Ranks) -> str:
    """Words for the first thing that is not finite, the same on every rank.

    Looks at the inputs, the weights, then at each module's output in a forward pass, in the order of execution. All
    ranks call it together.

    Args:
        loss: runs ``model`` on a batch once.
        batches: the micro-batches of the step, as many on every rank.
    """
    # every rank makes all forward passes, since one may be a collective
    outputs = [_bad_output(model, loss, batch) for batch in batches]
    found = [*map(_bad_input, batches), _bad_weight(model), *outputs]
    for rank, words in enumerate(ranks.gather(next((words for words in found if words is not None), None))):
        if words is not None:
            return words if ranks.world == 1 else f"rank {rank}: {words}"
    return "the forward pass is finite on every rank: the overflow is in the backward pass"


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _bad_input(batch: Batch) -> str | None:
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
    first: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            if not first and not all(is_finite(t) for t in tensors):
                first.append(f"the output of module {name or 'the model'} ({type(module).__name__}) is not finite")

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        value = loss(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if first:
        return first[0]
    return None if is_finite(value) else "the loss itself is not finite, though the model's output is"
