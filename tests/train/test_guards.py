"""Steps that are not finite, on two ranks: skipped together, and after too many of them explained and ended."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import last_checkpoint, result, same_end, tensors_of
from faults import InfInput, NanLoss, NanWeight, Overflow
from ranks_apart import Fault, run_ranks

from mmtrain.config import TrainConfig, load_config
from mmtrain.errors import UserError
from mmtrain.parallel.ranks import Ranks
from mmtrain.tasks import build_task
from mmtrain.train.evaluate import evaluate
from mmtrain.train.guards import is_spike
from mmtrain.train.session import train
from mmtrain.train.state import TrainState

SHORT = ("train.max_steps=6", "eval.every_steps=3", "train.accumulation=2")


def test_the_first_window_of_losses_is_only_noted() -> None:
    config, state = TrainConfig(spike_factor=5, spike_window=4), TrainState()
    assert [is_spike(config, state, loss) for loss in (1.0, 100.0, 1.0, 1.0)] == [False] * 4
    assert state.recent_losses == [1.0, 100.0, 1.0, 1.0]
    assert is_spike(config, state, 5.01)  # the median is 1
    assert state.recent_losses == [1.0, 100.0, 1.0, 1.0], "a spike is compared with nothing later"
    assert not is_spike(config, state, 5.0)
    assert state.recent_losses == [100.0, 1.0, 1.0, 5.0]
    assert not is_spike(TrainConfig(spike_factor=None), state, 1e9)


def test_a_signal_on_one_rank_ends_the_evaluation_on_every_rank(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is rank 0 of 2 and nobody asked it to stop."""
    config = load_config(series, ("eval.batch_size=1", "data.workers=0"))
    task, ranks = build_task(config), Ranks(0, 2, torch.device("cpu"))
    looked: list[int] = []

    def other(tensor: torch.Tensor) -> None:
        looked.append(int(tensor))
        tensor += int(len(looked) == 2)  # rank 1 was signalled before the second look

    monkeypatch.setattr("torch.distributed.all_reduce", other)
    monkeypatch.setattr(task, "measure", lambda model, batch: {"count": torch.tensor(1.0, dtype=torch.float64)})
    assert evaluate(task, task.build_model(), task.val, config, ranks) is None
    assert looked == [0, 0]


@pytest.mark.slow
def test_a_bad_loss_on_one_rank_is_skipped_by_both(series: Path, tmp_path: Path) -> None:
    """Whichever rank it was: no rank's part of the step counts, so both runs come to the same."""
    for on in (0, 1):
        ended = run_ranks(series, tmp_path / str(on), *SHORT, fault=NanLoss(on, steps=(2, 4)))
        assert [rank.status for rank in ended] == [0, 0], ended
        assert result(tmp_path / str(on))["skipped_steps"] == 2
        assert ended[0].said.count("The step is skipped") == 2
    assert all(t.isfinite().all() for t in tensors_of(last_checkpoint(tmp_path / "0")).values())
    assert same_end(tmp_path / "0", tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (NanLoss(1, steps=(2, 3)), "rank 1: the loss is not finite"),
        (NanWeight(1, step=2), "rank 1: the weight .* is not finite"),
        (Overflow(1, "TimeFeatureNorm"), r"rank 1: the output of module \S+ \(TimeFeatureNorm\) is not finite"),
    ],
    ids=["loss", "weight", "module"],
)
def test_two_bad_steps_in_a_row_end_both_ranks_with_one_message(
    series: Path, tmp_path: Path, fault: Fault, words: str
) -> None:
    ended = run_ranks(series, tmp_path / "run", *SHORT, "train.max_bad_steps=2", fault=fault)
    assert [rank.status for rank in ended] == [2, 2], ended
    assert "Traceback" not in ended[0].said + ended[1].said
    assert "error" not in ended[1].said  # rank 0 says it for both
    assert re.search(f"error: .*2 consecutive steps: .*{words}", ended[0].said), ended


def test_a_bad_sample_is_named_in_whichever_micro_batch_it_is(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmtrain.data.core.order import Order
    from mmtrain.data.series.table_source import SeriesWindows

    monkeypatch.setattr(SeriesWindows, "fetch", SeriesWindows.fetch)  # put back afterwards
    config = load_config(series, (*SHORT, "train.max_bad_steps=1"))
    length = 600 * 7 // 10 - 48 - 24 + 1
    sample = int(Order([length], config.seed).lookup(np.array([33]))[1][0])  # of the second micro-batch of step 1
    InfInput(sample)(0)
    with pytest.raises(UserError, match=rf"the input 'past' of the samples {sample} is not finite"):
        train(config, tmp_path / "run")
