"""Activations and FLOPs of a step on the meta device, against real tensors and against other counts."""

from __future__ import annotations

import contextlib
import os
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mmtrain.config import ModelConfig, TrainConfig
from mmtrain.config.models import preset
from mmtrain.inspect.stages import stage_table, total
from mmtrain.models import build_model
from mmtrain.plan import step as plan_step
from mmtrain.plan.step import Costs, Shape, StepCosts, trace_step

VIM2 = preset("vim2_nano", drop_path=0.2)
TSM2 = preset("tsm2", lookback=96, horizon=24, dim=16)


def trace(config: ModelConfig, samples: int = 2, **train: object) -> StepCosts:
    return trace_step(config, TrainConfig(**train), Shape(samples, image_size=56, variates=5))  # type: ignore[arg-type]


def really_saved(config: ModelConfig, samples: int, dtype: torch.dtype | None) -> int:
    """Bytes of the storages that a forward pass on the CPU keeps for the backward pass, parameters left out."""
    model = build_model(config).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    held: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    narrow = torch.autocast("cpu", dtype) if dtype is not None else contextlib.nullcontext()
    # what is planned is a GPU's step, where mixers are composed of several operators
    with saved_tensors_hooks(pack, lambda tensor: tensor), patch.dict(os.environ, MMTRAIN_FUSE="0"), narrow:
        if config.name == "tsm2":
            loss = nn.functional.mse_loss(model(torch.randn(samples, 96, 5)).float(), torch.zeros(samples, 24, 5))
        else:
            logits = model(torch.randn(samples, 3, 56, 56))
            loss = nn.functional.cross_entropy(logits.float(), torch.zeros(samples, dtype=torch.long))
    assert loss.isfinite()
    return sum(storages.values())


@pytest.mark.parametrize("config", [VIM2, TSM2], ids=["vim2", "tsm2"])
def test_activations_are_those_that_a_real_forward_pass_keeps(config: ModelConfig) -> None:
    assert trace(config).kept == pytest.approx(really_saved(config, 2, None), rel=0.03)


@pytest.mark.parametrize("config", [VIM2, TSM2], ids=["vim2", "tsm2"])
def test_so_are_they_under_autocast(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # the CPU's autocast leaves norms and losses in the dtype they come in
    monkeypatch.setattr(plan_step, "FLOAT32_ON_CUDA", frozenset())
    narrow = trace(config, precision="bf16").kept
    assert narrow == pytest.approx(really_saved(config, 2, torch.bfloat16), rel=0.03)
    assert narrow != trace(config).kept


@pytest.mark.parametrize("config", [VIM2, TSM2], ids=["vim2", "tsm2"])
def test_activations_are_linear_in_the_samples(config: ModelConfig) -> None:
    two, four, eight = (trace(config, samples).kept for samples in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.01)
    assert eight == pytest.approx(4 * two, rel=0.1)  # but for copies of the weights


def test_checkpointing_keeps_less_and_computes_more() -> None:
    none, selective, full = (trace(VIM2, checkpointing=mode) for mode in ("none", "selective", "full"))
    assert none.kept > 1.2 * selective.kept > 2 * full.kept
    assert none.kept + none.working > full.kept + full.working
    assert full.flops == pytest.approx(none.flops + none.forward.flops, rel=0.02)
    # matrix products and scans are kept; the causal convolutions are not
    assert none.flops <= selective.flops < 1.02 * none.flops
    every_other = trace(VIM2, checkpointing="full", checkpointing_every=2)
    assert full.kept < every_other.kept < none.kept


def test_flops_are_those_of_the_table_of_stages() -> None:
    step = trace(VIM2)
    table = total(stage_table(VIM2, batch=2, image_size=(56, 56)))
    assert step.forward.flops == table.flops
    assert step.forward.scan_flops == table.scan_flops
    assert step.backward.scan_flops == 2 * table.scan_flops
    # each product has two gradients, but that of the stem's input is not wanted
    assert 1.98 * table.flops < step.backward.flops < 2 * table.flops


def matrix_flops(costs: Costs) -> int:
    return sum(cost.flops * count for cost, count in costs.counts.items() if cost.matrix)


def test_matrix_products_are_told_by_their_dtype() -> None:
    assert {cost.matrix for cost in trace(VIM2).forward.counts} == {"", "float32"}
    assert {cost.matrix for cost in trace(VIM2, precision="bf16").forward.counts} == {"", "bfloat16"}
    assert matrix_flops(trace(VIM2).forward) == matrix_flops(trace(VIM2, precision="bf16").forward)
