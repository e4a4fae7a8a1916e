"""Losses that jump: found by their distance from the median of the steps before."""

from __future__ import annotations

import statistics

from mmtrain.config import TrainConfig
from mmtrain.train.state import TrainState


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
