"""One micro-batch, forward and backward, on the meta device: its activations, FLOPs and memory traffic.

:func:`trace_step` runs it under :class:`StepTrace`, which watches what is alive and what each operation computes and
moves, and under :class:`MetaAutocast`, since torch knows no autocast of the meta device.
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
#: Run on the matrix units. Convolutions do not count as such: nearly all of these models' are depthwise.
_MATRIX = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}
#: The FLOPs of an operation.
_RULES = {**flop_registry, **{packet: shape_wrapper(rule) for packet, rule in FLOP_RULES.items()}}
_FREE = {_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.detach}


@dataclass(frozen=True)
class Cost:
    """One operation: FLOPs, the bytes it reads and writes, and the dtype of a matrix product ("" for the rest)."""

    flops: int
    moved: int
    matrix: str = ""


@dataclass
class Costs:
    """The operations of a pass, those of one kind and size counted together."""

    counts: Counter[Cost] = field(default_factory=Counter)
    scan_flops: int = 0

    @property
    def flops(self) -> int:
        return sum(cost.flops * count for cost, count in self.counts.items())


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
    autocast = meta_autocast(model, autocast_dtype(train))
    checkpoint_activations(model, train)
    measure: Callable[[Tensor, Tensor], Tensor]
    with torch.device("meta"):
        inputs = example_inputs(
            model_config,
            batch=shape.samples,
            image_size=(shape.image_size, shape.image_size),
            variates=shape.variates,
        )
        if isinstance(model_config, ForecasterConfig):
            measure, target = F.mse_loss, torch.zeros(shape.samples, model_config.horizon, shape.variates)
        else:
            measure, target = F.cross_entropy, torch.zeros(shape.samples, dtype=torch.long)
    trace = StepTrace(model)
    # the kernels' own rules for shapes and FLOPs, whatever backend the environment asks for
    with scan_backend("auto"), trace, autocast:
        for tensor in (*inputs, target):
            if tensor is not None:
                trace.watch(tensor)
        # the output gets no name here: it would count as kept for the backward pass
        loss = measure(model(*inputs).float(), target)
        forward, trace.costs = trace.costs, Costs()
        kept = trace.live
        loss.backward()
    return StepCosts(kept, trace.peak - kept, forward, trace.costs)


def meta_model(config: ModelConfig) -> nn.Module:
    """The model of ``config`` as shapes."""
    with torch.device("meta"):
        return build_model(config)


#: PyTorch, "Automatic Mixed Precision", Autocast Op Reference: those of its lists that the models and losses call.
NARROWED: frozenset[Callable[..., Any]] = frozenset({F.linear, F.conv1d, F.conv2d, torch.matmul, torch.mm, torch.bmm})
WIDENED_ON_CUDA: frozenset[Callable[..., Any]] = frozenset(
    {F.layer_norm, F.softplus, F.cross_entropy, F.mse_loss, F.l1_loss, torch.exp, torch.Tensor.cumsum, torch.Tensor.sum}
)


class MetaAutocast(TorchFunctionMode):
    """Casts floating-point arguments: to ``dtype`` for functions in NARROWED, to float32 for those in WIDENED_ON_CUDA.

    A weight is cast once a use, as autocast's cache does within one forward pass, so that the narrow copies which a
    backward pass keeps are counted.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = self.dtype if func in NARROWED else torch.float32 if func in WIDENED_ON_CUDA else None
        if target is None:
            return func(*args, **(kwargs or {}))

        def cast(value: Any) -> Any:
            floats = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(target) if floats else value

        return func(*(cast(a) for a in args), **{key: cast(value) for key, value in (kwargs or {}).items()})


def meta_autocast(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """A context in which ``model``, on the meta device and for planning only, runs as under autocast to ``dtype``
    (None: float32).

    The residual stream is widened by hooks, since a :class:`MixerStack` on the meta device asks for no autocast; and
    each branch carries the mode with it, since a branch that is computed again in the backward pass is out of it.
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
    """Within the context every operation is noted in :attr:`costs`, and the bytes of all it makes in :attr:`live`.

    Storages are counted once, however many views they have, from their first operation to their last reference. Those
    of ``model``'s parameters are not counted, nor are gradients once they stand in ``.grad``.
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
        """Count the storage of ``tensor`` until it goes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._foreign:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self._watched[key] = weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
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
    """``out`` of a convolution, or of its backward pass, in the layout that its input has.

    So it is on the CPU and on GPUs; on the meta device it is always contiguous, and every scan would copy it.
    """
    if packet is _aten.convolution and _is_channels_last(args[0]):
        return out.contiguous(memory_format=torch.channels_last)
    if packet is _aten.convolution_backward and out[0] is not None and _is_channels_last(args[1]):
        return out[0].contiguous(memory_format=torch.channels_last), *out[1:]
    return out


def _is_channels_last(x: Tensor) -> bool:
    """Whether channels run fastest in x (B, C, H, W), which may be a slice of something wider."""
    return x.ndim == 4 and x.stride(1) == 1 and x.shape[1] > 1


def _bytes(tensor: Tensor) -> int:
    """What reading ``tensor`` moves: of an expanded one, its storage alone."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
