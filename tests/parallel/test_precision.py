"""Half precision: what stays float32 under every strategy, what is refused, and the loss scale of fp16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtrain.config import ParallelConfig, RunConfig, TrainConfig
from mmtrain.errors import UserError
from mmtrain.parallel.build import check_strategy
from mmtrain.train.guards import initial_loss_scale, update_loss_scale
from mmtrain.train.state import TrainState
from tests.parallel.cases import Case
from tests.parallel.conftest import HAS_DEEPSPEED
from tests.parallel.jobs import dtypes, trained
from tests.parallel.results import lines, same_losses
from tests.parallel.runs import Runs

_BF16 = ("train.precision", "bf16")
_FP16 = ("train.precision", "fp16")
_SHORT = ("train.max_steps", 5)


def _must_stay(name: str) -> bool:
    """What a scan or a sum over the depth does not survive in bf16."""
    return any(part in name for part in ("A_log", ".D", "dt_proj", "norm", "averages"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(m, "fsdp", 2, (_BF16, _SHORT)) for m in ("vim2", "tsm2")], ids=str)
def test_narrow_gathering_leaves_the_scans_float32(case: Case, runs: Runs) -> None:
    narrow = Case(case.model, "fsdp", 2, (*case.changes, ("parallel.gather", "bf16")))
    by_rank, folder = runs.do(dtypes, narrow, "dtypes")
    for found in by_rank:
        assert {torch.float32} == set(found["kept"].values())
        stay = {name: dtype for name, dtype in found["forward"].items() if _must_stay(name)}
        assert {torch.float32} == set(stay.values())
        for kind in ("A_log", ".D", "dt_proj.bias", "norm", "averages"):
            assert any(kind in name for name in stay), kind
        assert torch.bfloat16 in found["forward"].values()  # the others did travel narrow
    # autocast would have rounded the very same weights: only embeddings and convolutions' biases may differ
    same_losses(folder, runs.of(case.alone), rel=1 / 256)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("tsm2", f"zero{stage}", 2, (_BF16, _SHORT)) for stage in (1, 2, 3)], ids=str)
def test_zero_keeps_everything_float32_in_bf16(case: Case, runs: Runs) -> None:
    by_rank, folder = runs.do(dtypes, case, "dtypes")
    for found in by_rank:
        assert {torch.float32} == set(found["forward"].values())
        assert {torch.float32} == set(found["kept"].values())
        assert any(key.startswith("exp_avg_sq") for key in found["kept"])
    same_losses(folder, runs.of(case.alone), rel=1 / 256)


def _config(strategy: str, precision: str = "bf16", **how: object) -> RunConfig:
    config = RunConfig()
    config.train.precision = precision
    config.parallel.strategy = strategy
    for key, value in how.items():
        setattr(config.parallel, key, value)
    return config


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_narrow_gathering_is_for_fsdp(strategy: str) -> None:
    with pytest.raises(UserError, match=f"fsdp and hsdp only, not by {strategy}. Set it to fp32"):
        check_strategy(_config(strategy, gather="bf16"), 2)
    check_strategy(_config("fsdp", gather="bf16"), 2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_narrow_gathering_is_for_bf16(precision: str) -> None:
    with pytest.raises(
        UserError, match=f"precision is '{precision}'.*Set parallel.gather=fp32 or train.precision=bf16"
    ):
        check_strategy(_config("fsdp", precision, gather="bf16"), 2)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed: pip install 'mmtrain[deepspeed]'")
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_refuses_fp16(strategy: str) -> None:
    with pytest.raises(UserError, match=r"Use train.precision=bf16 or parallel.strategy=fsdp"):
        check_strategy(_config(strategy, "fp16"), 2)


def test_gather_takes_no_other_dtype() -> None:
    with pytest.raises(UserError, match=r"parallel.gather='fp16': choose one of fp32, bf16"):
        ParallelConfig(gather="fp16")


def test_the_loss_scale_grows_and_halves() -> None:
    config = TrainConfig(precision="fp16")
    state = TrainState(loss_scale=initial_loss_scale(config))
    assert state.loss_scale == 2**15
    for _ in range(1999):
        assert not update_loss_scale(state, config, finite=True)
    assert state.loss_scale == 2**15
    update_loss_scale(state, config, finite=True)
    assert state.loss_scale == 2**16
    for _ in range(1999):  # an overflow begins the count anew
        update_loss_scale(state, config, finite=True)
    assert update_loss_scale(state, config, finite=False)
    assert (state.loss_scale, state.good_in_a_row) == (2**15, 0)
    for _ in range(15):
        assert update_loss_scale(state, config, finite=False)
    assert state.loss_scale == 1
    assert not update_loss_scale(state, config, finite=False)  # now the scale is not to blame


def test_there_is_no_loss_scale_without_fp16() -> None:
    for precision in ("fp32", "bf16"):
        config = TrainConfig(precision=precision)
        state = TrainState(loss_scale=initial_loss_scale(config))
        assert not update_loss_scale(state, config, finite=False)
        assert state.loss_scale == 1


def test_an_overflow_of_fp16_halves_the_scale_and_no_more(
    bases: dict[str, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is left out: the weights stay finite, and it is not counted as a bad one."""
    from mmtrain.tasks.forecasting import Forecasting

    sound = Forecasting.loss

    def loud(self, model, batch, key):  # type: ignore[no-untyped-def]
        loss = sound(self, model, batch, key)
        # the loss itself is finite; times the scale it is not
        return loss * 1e35 if key.step == 2 else loss

    monkeypatch.setattr(Forecasting, "loss", loud)
    trained(Case("tsm2", changes=(_FP16, _SHORT)).configure(bases["tsm2"]), tmp_path / "run")
    scales = [line["loss_scale"] for line in lines(tmp_path / "run", "train")]
    assert scales == [2**15, 2**15, 2**14, 2**14, 2**14]
    assert '"skipped_steps": 0' in (tmp_path / "run" / "result.json").read_text()


def test_fp16_learns_what_fp32_learns(bases: dict[str, RunConfig], tmp_path: Path) -> None:
    for name, changes in (("fp16", (_FP16, _SHORT)), ("fp32", (_SHORT,))):
        trained(Case("tsm2", changes=changes).configure(bases["tsm2"]), tmp_path / name)
    # fp16 rounds to 1 in 2048, at each of some tens of operations in a row
    same_losses(tmp_path / "fp16", tmp_path / "fp32", rel=1 / 128)
