"""Numbers, choices and bounds of the sections: one table, whatever the section is made by."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any, get_args

import pytest

from mmtrain.config import (
    STRATEGIES,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    ViM2Config,
    load_config,
    replace,
)
from mmtrain.errors import UserError
from mmtrain.models.vim2 import BLOCKS


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.epochs=inf", "train.epochs='inf': must be a finite float above 0"),
        ("train.epochs=nan", "train.epochs='nan': must be a finite float above 0"),
        ("optim.betas=[0.9,.inf]", "optim.betas[1]=inf: must be a finite float in [0, 1)"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: must be a list of 2, each a finite float in [0, 1)"),
        ("optim.lr=-1", "optim.lr=-1: must be above 0"),
        ("optim.weight_decay=-0.1", "optim.weight_decay=-0.1: must be at least 0"),
        ("optim.clip_norm=0", "optim.clip_norm=0: must be above 0, or null"),
        ("train.batch_size=-4", "train.batch_size=-4: must be in [1, 16777216]"),
        ("train.batch_size=true", "train.batch_size=True: must be an int in [1, 16777216]"),
        ("train.batch_size=null", "train.batch_size=None: must be an int in [1, 16777216]"),
        ("train.spike_factor=1", "train.spike_factor=1: must be above 1, or null"),
        ("train.ema_decay=1", "train.ema_decay=1: must be in (0, 1), or null"),
        ("train.tf32=maybe", "train.tf32='maybe': must be a bool"),
        ("train.profile=3:1", "train.profile='3:1': give FIRST:LAST steps, such as 10:12"),
        ("task.label_smoothing=1", "task.label_smoothing=1: must be in [0, 1)"),
        ("data.crop_pct=0", "data.crop_pct=0: must be in (0, 1]"),
        ("data.max_faults=1.5", "data.max_faults=1.5: must be in [0, 1]"),
        ("model.state=65", "model.state=65: must be in [1, 64]"),
        ("model.dims=[0,1,2]", "model.dims[0]=0: must be at least 1"),
        ("eval.select=first", "eval.select='first': choose one of best, last"),
        ("parallel.strategy=dp", "choose one of auto, none, ddp, fsdp, hsdp, zero1, zero2, zero3"),
        ("parallel.offload=true", "parallel.offload=True: only supported with parallel.strategy=zero1, zero2 or zero3"),
        ("cluster.min_nodes=3", "cluster.min_nodes=3: set both min_nodes and max_nodes"),
        ("device=tpu", "device='tpu': choose one of auto, cpu, cuda"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_its_source(override: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("vim2_digits", [override])
    assert str(caught.value).startswith("command line: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["separator=;", "decimal=comma", "time_format=dmy", "duplicates=mean"])
def test_a_panel_takes_no_key_of_a_table(key: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{key.partition('=')[0]}=.*a prepared panel ignores this key"):
        load_config("tsm2_m5", [f"data.{key}"])


def test_a_section_made_in_python_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"train\.epochs=inf"):
        TrainConfig(epochs=float("inf"))
    with pytest.raises(UserError, match=r"unknown key 'train\.epoch'; did you mean 'train\.epochs'"):
        TrainConfig(epoch=1)
    with pytest.raises(UserError, match=r"train\.precision='fp8'"):
        RunConfig(train={"precision": "fp8"})
    with pytest.raises(UserError, match=r"train\.batch_size=0"):
        replace(TrainConfig(), batch_size=0)


def test_a_copy_changes_what_it_is_told_to() -> None:
    config = load_config("vim2_digits")
    copy = replace(config, seed=3, train=replace(config.train, epochs=2))
    assert (copy.seed, copy.train.epochs, config.seed) == (3, 2, 0)
    assert isinstance(copy.model, ViM2Config)
    assert copy.model == config.model


@pytest.mark.parametrize("copied", [deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_configurations_survive_copies_and_processes(copied: Any) -> None:
    config = load_config("vim2_digits")
    assert copied(config) == config
    assert type(copied(config).data) is type(config.data)
    assert RunConfig().train is not RunConfig().train


def test_the_described_choices_are_those_of_the_schema() -> None:
    strategies = get_args(ParallelConfig.model_fields["strategy"].annotation)
    assert strategies == ("auto", *STRATEGIES)
    assert set(get_args(ViM2Config.model_fields["block"].annotation)) == set(BLOCKS)
