"""A loss that jumps sends the run back to its last checkpoint and past the samples that did it."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare import last_checkpoint, same_end
from faults import All, Kill, Spike
from ranks_apart import run_ranks

from mmtrain.config import load_config
from mmtrain.errors import UserError
from mmtrain.tasks.forecasting import Forecasting
from mmtrain.train.checkpoint.store import load_state
from mmtrain.train.session import train

BATCH = 32
#: The spike is in the 9th step; the last checkpoint before it is that of step 7, an evaluation.
SPIKE = Spike(first=8 * BATCH, last=9 * BATCH - 1)
OPTIONS = (
    "train.max_steps=14",
    "train.spike_factor=5",
    "train.spike_window=4",
    "eval.every_steps=7",
    "tracking.plots=false",
    "checkpoint.asynchronous=false",
)
OPTIONS += ("checkpoint.every_steps=3", "checkpoint.keep=100", "train.ema_decay=0.9")


@pytest.fixture
def sound_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faults of this test, which patch the loss, end with it."""
    monkeypatch.setattr(Forecasting, "loss", Forecasting.loss)


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 10], ids=["before the next checkpoint", "after it"])
def test_a_run_killed_after_a_rollback_ends_as_one_that_was_not(series: Path, tmp_path: Path, step: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = run_ranks(series, whole, *OPTIONS, fault=SPIKE)
    assert [rank.status for rank in ended] == [0, 0], ended
    assert "returns to the checkpoint of step 7" in ended[0].said
    state = load_state(last_checkpoint(whole))
    # from the checkpoint of step 7 to the end of the 9th step
    assert (state["rollbacks"], state["left_out"], state["step"]) == (1, 2 * BATCH, 14)
    assert state["samples"] == (14 + 2) * BATCH

    # the steps taken again have the numbers of those before, but later samples
    ended = run_ranks(series, killed, *OPTIONS, fault=All((SPIKE, Kill(1, step, (step + 2) * BATCH))))
    assert ended[1].status == -9, ended
    assert ended[0].status not in (0, None)
    ended = run_ranks(series, killed, *OPTIONS, fault=SPIKE)
    assert [rank.status for rank in ended] == [0, 0], ended
    assert f"resuming at step {7 if step == 8 else 9}" in ended[0].said
    assert same_end(whole, killed)


@pytest.mark.usefixtures("sound_loss")
def test_without_a_checkpoint_a_spike_ends_the_run(series: Path, tmp_path: Path) -> None:
    SPIKE(0)
    config = load_config(series, (*OPTIONS, "checkpoint.every_steps=null", "eval.every_steps=14"))
    with pytest.raises(UserError, match=r"step 8: the loss jumped to .*there is no checkpoint yet. Lower optim.lr"):
        train(config, tmp_path / "run")


@pytest.mark.usefixtures("sound_loss")
def test_rollbacks_without_end_end_the_run(series: Path, tmp_path: Path) -> None:
    Spike(first=8 * BATCH, last=10**9)(0)  # all that follows
    config = load_config(series, (*OPTIONS, "train.max_bad_steps=2"))
    with pytest.raises(UserError, match=r"the run was rolled back 2 times already"):
        train(config, tmp_path / "run")
    assert load_state(last_checkpoint(tmp_path / "run"))["step"] == 7  # what was good is there
