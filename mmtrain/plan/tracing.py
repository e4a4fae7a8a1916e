"""Watches a step on the meta device: what is alive at any time, and what each operation computes and moves."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
#: Run on the matrix units. Convolutions do not count as such: nearly all of these models' are depthwise.
_MATRIX = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}
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

    @property
    def matrix_flops(self) -> int:
        return sum(cost.flops * count for cost, count in self.counts.items() if cost.matrix)

    @property
    def moved(self) -> int:
        return sum(cost.moved * count for cost, count in self.counts.items())

    @property
    def kernels(self) -> int:
        return self.counts.total()


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
            flops = _flops(packet, args, kwargs, out)
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


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """By the rules of torch's FLOP counter, but for the gradients of a convolution.

    Its rule counts the weight gradient of a depthwise convolution as that of a dense one; each of the two gradients
    takes as many operations as the convolution itself.
    """
    if packet is _aten.convolution_backward:
        grad, _, weight, *_, mask = args
        return 2 * grad.numel() * weight[0].numel() * sum(mask[:2])
    rule = flop_registry.get(packet)
    return int(rule(*args, **kwargs, out_val=out)) if rule is not None else 0


def _bytes(tensor: Tensor) -> int:
    """What reading ``tensor`` moves: of an expanded one, its storage alone."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
