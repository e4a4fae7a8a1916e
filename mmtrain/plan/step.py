"""Activations, FLOPs and memory traffic of one micro-batch, forward and backward, on the meta device.

:func:`trace_step` runs the micro-batch under :class:`StepTrace`, which records live memory and the cost of each
operation, and under :class:`MetaAutocast`, because torch has no autocast for the meta device.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

import mmtrain.ops  # noqa: F401 - defines torch.ops.mmtrain
from mmtrain.config import ForecasterConfig, ModelConfig, TrainConfig
from mmtrain.models import build_model, example_inputs
from mmtrain.models.averaging import MixerStack
from mmtrain.ops.backend import scan_backend
from mmtrain.train.build import checkpoint_activations
from mmtrain.train.flops import FLOP_RULES
from mmtrain.train.optim import autocast_dtype

_aten = torch.ops.aten
#: Operations on the matrix units. Convolutions are not among them, since nearly all in these models are depthwise.
_MATRIX = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}
#: Functions that compute the FLOPs of an operation.
_RULES = {**flop_registry, **{packet: shape_wrapper(rule) for packet, rule in FLOP_RULES.items()}}
#: Operations that move no memory.
_FREE = {_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.detach}


@dataclass(frozen=True)
class Cost:
    """Cost of one operation: FLOPs, bytes read and written, and the dtype if it is a matrix product (else "")."""

    flops: int
    moved: int
    matrix: str = ""


@dataclass
class Costs:
    """The operations of a forward or backward pass, with the number of operations of equal cost."""

    counts: Counter[Cost] = field(default_factory=Counter)
    scan_flops: int = 0

    @property
    def flops(self) -> int:
        return sum(cost.flops * count for cost, count in self.counts.items())


@dataclass(frozen=True)
class Shape:
    """Shape of a micro-batch: ``samples`` images of ``image_size``² pixels, or windows of ``variates`` variates."""

    samples: int
    image_size: int = 224
    variates: int = 7


@dataclass(frozen=True)
class StepCosts:
    """Memory and operations of one micro-batch on one rank.

    The memory does not include parameters, their gradients, kernel workspaces and fragmentation of the allocator.

    Attributes:
        kept: Bytes alive at the end of the forward pass: inputs and tensors saved for the backward pass, with autocast
            also the lower-precision copies of the weights.
        working: Additional bytes at the peak of both passes: intermediate results, gradients of activations, and
            recomputed tensors.
        forward: Operations of the forward pass.
        backward: Operations of the backward pass, including recomputation.
    """

    kept: int
    working: int
    forward: Costs
    backward: Costs

    @property
    def flops(self) -> int:
        return self.forward.flops + self.backward.flops


def trace_step(model_config: ModelConfig, train: TrainConfig, shape: Shape) -> StepCosts:
    """Trace one micro-batch on the meta device and return its costs.

    The loss is the cross-entropy or the squared error of the point forecast. Mixup, label smoothing, quantiles and
    metrics are neglected, since they add only a few operations per sample.
    """
    model = meta_model(model_config).train()
    autocast = meta_autocast(model, autocast_dtype(train))
    checkpoint_activations(model, train)
    criterion: Callable[[Tensor, Tensor], Tensor]
    with torch.device("meta"):
        inputs = example_inputs(
            model_config,
            batch=shape.samples,
            image_size=(shape.image_size, shape.image_size),
            variates=shape.variates,
        )
        if isinstance(model_config, ForecasterConfig):
            criterion, target = F.mse_loss, torch.zeros(shape.samples, model_config.horizon, shape.variates)
        else:
            criterion, target = F.cross_entropy, torch.zeros(shape.samples, dtype=torch.long)
    trace = StepTrace(model)
    # "auto" uses the kernels' rules for shapes and FLOPs, whatever backend the environment sets
    with scan_backend("auto"), trace, autocast:
        for tensor in (*inputs, target):
            if tensor is not None:
                trace.watch(tensor)
        # do not assign the output to a variable: it would stay alive and count as kept for the backward pass
        loss = criterion(model(*inputs).float(), target)
        forward, trace.costs = trace.costs, Costs()
        kept = trace.live
        loss.backward()
    return StepCosts(kept, trace.peak - kept, forward, trace.costs)


def meta_model(config: ModelConfig) -> nn.Module:
    """Build the model of ``config`` on the meta device."""
    with torch.device("meta"):
        return build_model(config)


#: Functions that autocast runs in lower precision, and in float32, as far as the models and losses call them. Source:
#: PyTorch, "Automatic Mixed Precision", Autocast Op Reference.
LOWERED: frozenset[Callable[..., Any]] = frozenset({F.linear, F.conv1d, F.conv2d, torch.matmul, torch.mm, torch.bmm})
FLOAT32_ON_CUDA: frozenset[Callable[..., Any]] = frozenset(
    {F.layer_norm, F.softplus, F.cross_entropy, F.mse_loss, F.l1_loss, torch.exp, torch.Tensor.cumsum, torch.Tensor.sum}
)


class MetaAutocast(TorchFunctionMode):
    """Casts floating-point arguments to ``dtype`` for functions in LOWERED, and to float32 for FLOAT32_ON_CUDA.

    A weight is cast once per use, as with autocast's cache within one forward pass. So the lower-precision copies that
    are saved for the backward pass are counted.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = self.dtype if func in LOWERED else torch.float32 if func in FLOAT32_ON_CUDA else None
        if target is None:
            return func(*args, **(kwargs or {}))

        def cast(value: Any) -> Any:
            floats = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(target) if floats else value

        return func(*(cast(a) for a in args), **{key: cast(value) for key, value in (kwargs or {}).items()})


def meta_autocast(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return a context in which ``model`` runs on the meta device as under autocast to ``dtype``.

    Hooks cast the residual stream to float32, because a :class:`MixerStack` does not see this autocast. Each branch
    enters the mode itself, because a branch that is recomputed in the backward pass runs outside of the context.

    Args:
        model: A model on the meta device, used for planning only. It is changed.
        dtype: The dtype of autocast, or None for float32.
    """
    if dtype is None:
        return nullcontext()
    mode = MetaAutocast(dtype)

    def within(branch: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
        def run(stream: Tensor, i: int) -> Tensor:
            with mode:
                return branch(stream, i)

        return run

    for stack in [module for module in model.modules() if isinstance(module, MixerStack)]:
        stack.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        stack._branch = within(stack._branch)  # type: ignore[method-assign, assignment]
    return mode


class StepTrace(TorchDispatchMode):
    """Context that records the cost of every operation in :attr:`costs` and the live bytes in :attr:`live`.

    A storage counts once, from the operation that creates it until its last reference is gone. Parameters of ``model``
    do not count, and their gradients only until they are accumulated into ``.grad``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.costs = Costs()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.finalize[..., Any]] = {}
        self._foreign = {p.untyped_storage()._cdata for p in model.parameters()}
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self._gradient_is_done)

    def watch(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._foreign:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self._watched[key] = weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._watched.pop(key, None)
        self.live -= self._sizes.pop(key, 0)

    def _gradient_is_done(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self.live -= self._sizes.get(storage._cdata, 0)
        if storage._cdata in self._sizes:
            self._sizes[storage._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        out = _channels_last(packet, args, func(*args, **kwargs))
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in outputs:
            self.watch(tensor)
        if not func.is_view and packet not in _FREE:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            rule = _RULES.get(packet)
            flops = int(rule(*args, **kwargs, out_val=out)) if rule is not None else 0
            if "selective_scan" in str(packet):
                self.costs.scan_flops += flops
            matrix = str(inputs[0].dtype).removeprefix("torch.") if packet in _MATRIX else ""
            self.costs.counts[Cost(flops, sum(map(_bytes, [*inputs, *outputs])), matrix)] += 1
        return out


def _channels_last(packet: Any, args: Any, out: Any) -> Any:
    """Return the output ``out`` of a convolution, or of its backward pass, in the memory layout of its input.

    The CPU and GPUs do the same. The meta device always returns a contiguous tensor, which every scan would copy.
    """
    if packet is _aten.convolution and _is_channels_last(args[0]):
        return out.contiguous(memory_format=torch.channels_last)
    if packet is _aten.convolution_backward and out[0] is not None and _is_channels_last(args[1]):
        return out[0].contiguous(memory_format=torch.channels_last), *out[1:]
    return out


def _is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of x (B, C, H, W) are contiguous; x may be a slice of a larger tensor."""
    return x.ndim == 4 and x.stride(1) == 1 and x.shape[1] > 1


def _bytes(tensor: Tensor) -> int:
    """Return the bytes moved by reading ``tensor``; an expanded tensor counts with its storage only."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
