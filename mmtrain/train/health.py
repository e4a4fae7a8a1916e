"""What tells whether a run is well: peak memory, and how far the weights of the averaging have moved."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mmtrain.inspect.kinds import is_channel_mixer
from mmtrain.models.averaging import MixerStack, WeightedAverage

#: The families of the averaging's weights, by (is the consumer a channel mixer, is the source one).
_FAMILIES = {
    (False, False): "alpha",
    (False, True): "beta",
    (True, False): "theta",
    (True, True): "gamma",
}
FAMILIES = (*_FAMILIES.values(), "out")


def memory_peak(device: torch.device) -> float:
    """Peak memory so far, in GiB: what torch allocated on a GPU, the resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss, which a process inherits from the one that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20  # KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def averaging_norms(model: nn.Module) -> dict[str, float]:
    """How far the weighted averaging has moved from a residual stream: by family, 0 at the start.

    The root mean square, over all stacks, of the distance of a family's weights from what they start at: 1, and 0 for
    the second copy of a stack's input. ``alpha`` and ``beta`` weigh token and channel outputs in the input of a token
    mixer, ``theta`` and ``gamma`` in that of a channel mixer; of the input's two copies the first is the token one.
    ``out``: all weights of the stacks' outputs. A family without weights is left out; all are without averaging.

    With sharded parameters (FSDP2) it is a collective of one reduction, which every rank must call.

    Raises:
        ValueError: for a parameter that is neither whole nor a DTensor: gather it first (ZeRO-3).
    """
    averages, families = [], []
    for stack in model.modules():
        if isinstance(stack, MixerStack) and len(stack.averages):
            found = [average for average in stack.averages if isinstance(average, WeightedAverage)]
            averages += found
            families += _families([is_channel_mixer(mixer) for mixer in stack.mixers])
    if not averages:
        return {}
    parameters = [parameter for average in averages for parameter in (average.weight, average.input_copy)]
    start = [float(i % 2 == 0) for i in range(len(parameters))]
    moved = [value - start[i] for i, values in enumerate(_whole(parameters, families)) for value in values]
    labels = [label for group in families for label in group]
    sums = {family: [d * d for d, label in zip(moved, labels, strict=True) if label == family] for family in FAMILIES}
    return {family: (sum(found) / len(found)) ** 0.5 for family, found in sums.items() if found}


def _families(channel: list[bool]) -> list[list[str]]:
    """The family of each element of a stack's parameters: ``weight`` and ``input_copy`` of its averages in turn.

    Args:
        channel: whether each of its mixers is a channel mixer.
    """
    groups = []
    for i in range(len(channel) + 1):
        sources = [False, *channel[:i]]  # the stack's input, first copy, then what is earlier
        if i < len(channel):
            groups += [[_FAMILIES[channel[i], source] for source in sources], [_FAMILIES[channel[i], True]]]
        else:
            groups += [["out"] * len(sources), ["out"]]
    return groups


def _whole(parameters: list[nn.Parameter], families: list[list[str]]) -> list[list[float]]:
    """The elements of each parameter, put together from all ranks if any is sharded.

    Every rank writes what it holds into a vector of all elements and counts it: the sum of the vectors over the sum of
    the counts is right for any mesh, sharded or replicated, with one reduction for hundreds of tiny parameters.
    """
    sizes = [len(group) for group in families]
    local, index, begin = [], [], 0
    for parameter, size in zip(parameters, sizes, strict=True):
        if parameter.numel() != size:
            raise ValueError(f"a parameter of the averaging holds {parameter.numel()} elements of {size}: gather it")
        here, offset = _held(parameter.detach())
        local.append(here)
        index.append(torch.arange(begin + offset, begin + offset + len(here)))
        begin += size
    held = torch.cat(local).double()
    vectors = held.new_zeros(2, begin)
    vectors[:, torch.cat(index).to(held.device)] = torch.stack([held, torch.ones_like(held)])
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        dist.all_reduce(vectors)
    return [values.tolist() for values in torch.split((vectors[0] / vectors[1]).cpu(), sizes)]


def _held(parameter: Tensor) -> tuple[Tensor, int]:
    """The elements of a one-dimensional parameter that this rank holds, and where they begin."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), offset[0]
