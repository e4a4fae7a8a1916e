"""One micro-batch, forward and backward, on the meta device: its activations, FLOPs and memory traffic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ModelConfig, TrainConfig, TSM2Config
from mmtrain.inspect.stages import example_inputs
from mmtrain.models import build_model
from mmtrain.ops.backend import scan_backend
from mmtrain.plan.autocast import meta_autocast
from mmtrain.plan.recompute import checkpoint_activations
from mmtrain.plan.tracing import Costs, StepTrace

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """The input of a micro-batch: ``samples`` images of ``image_size``² pixels, or windows of ``variates`` series."""

    samples: int
    image_size: int = 224
    variates: int = 7


@dataclass(frozen=True)
class StepCosts:
    """Of one micro-batch on one rank.

    ``kept``: bytes alive at the end of the forward pass, which are the inputs and what the backward pass needs (with
    autocast also the narrow copies of the weights). ``working``: bytes beyond ``kept`` in the fullest moment of both
    passes: results under way, gradients of activations, what is being recomputed. Neither holds parameters, their
    gradients, workspaces of kernels, or what the allocator loses to fragmentation.
    """

    kept: int
    working: int
    forward: Costs
    backward: Costs

    @property
    def flops(self) -> int:
        return self.forward.flops + self.backward.flops


def trace_step(model_config: ModelConfig, train: TrainConfig, shape: Shape) -> StepCosts:
    """Run one micro-batch without memory.

    The loss is plain cross-entropy or the squared error of the point forecast: what Mixup, smoothing, quantiles and
    metrics add to it is a few numbers a sample.
    """
    model = meta_model(model_config).train()
    autocast = meta_autocast(model, _DTYPES.get(train.precision))
    checkpoint_activations(model, train)
    with torch.device("meta"):
        inputs = example_inputs(
            model_config,
            batch=shape.samples,
            image_size=(shape.image_size, shape.image_size),
            variates=shape.variates,
        )
        target = _target(model_config, shape)
    trace = StepTrace(model)
    # the kernels' own rules for shapes and FLOPs, whatever backend the environment asks for
    with scan_backend("auto"), trace, autocast:
        for tensor in (*inputs, target):
            if tensor is not None:
                trace.watch(tensor)
        loss = _loss(model_config, model(*inputs), target)
        forward, trace.costs = trace.costs, Costs()
        kept = trace.live
        loss.backward()
    return StepCosts(kept, trace.peak - kept, forward, trace.costs)


def meta_model(config: ModelConfig) -> nn.Module:
    """The model of ``config`` as shapes."""
    with torch.device("meta"):
        return build_model(config)


def _target(config: ModelConfig, shape: Shape) -> Tensor:
    if isinstance(config, TSM2Config):
        return torch.zeros(shape.samples, config.horizon, shape.variates)
    return torch.zeros(shape.samples, dtype=torch.long)


def _loss(config: ModelConfig, output: Tensor, target: Tensor) -> Tensor:
    if isinstance(config, TSM2Config):
        return F.mse_loss(output.float(), target)
    return F.cross_entropy(output.float(), target)
