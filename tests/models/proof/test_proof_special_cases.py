"""The special cases that the paper's block contains, and a whole ViM2 against the equations written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mmtrain.models import create_model
from mmtrain.models.averaging import MixerStack, WeightedAverage
from mmtrain.models.mixers import ImageChannelMixer, ImageTokenMixer
from mmtrain.models.vim2 import BLOCKS
from proof import by_hand
from proof.measures import scaled_error


def randomised(module: nn.Module) -> nn.Module:
    """Move every parameter off its initial value, so that gains of 1, biases of 0 and unit weights hide nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def whole_stage(averaging: bool) -> MixerStack:
    """Stage 3 of ViM2-T, narrow: six token and three channel mixers, in the order T T C."""
    mixers: list[nn.Module] = []
    for _ in range(3):
        mixers += [ImageTokenMixer(16), ImageTokenMixer(16), ImageChannelMixer(16, window=7)]
    return MixerStack(mixers, [nn.LayerNorm(16) for _ in mixers], [nn.Identity() for _ in mixers], averaging)


@pytest.mark.parametrize("averaging", [True, False])
def test_a_stage_starts_as_a_residual_stack(averaging: bool) -> None:
    """Exactly the same operations but for the order of additions: float32 rounding, 1e-5 of the scale."""
    stack = whole_stage(averaging)
    # everything but the averages moves off its start
    for mixer in [*stack.mixers, *stack.norms]:
        randomised(mixer)
    mixers, norms = copy.deepcopy(list(stack.mixers)), copy.deepcopy(list(stack.norms))
    x, weight = torch.randn(2, 9, 12, 16), torch.randn(2, 9, 12, 16)
    y = x
    for mixer, norm in zip(mixers, norms, strict=True):
        y = y + mixer(norm(y))
    assert scaled_error(stack(x), y) < 1e-5
    (stack(x) * weight).sum().backward()
    (y * weight).sum().backward()
    for ours, theirs in zip([*stack.mixers, *stack.norms], [*mixers, *norms], strict=True):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            # gradients are sums over 216 tokens: 1e-4 of the scale
            assert scaled_error(p.grad, q.grad) < 1e-4, name


def test_the_final_sum_is_part_of_the_stage() -> None:
    stack = whole_stage(averaging=True)
    last = stack.averages[-1]
    assert isinstance(last, WeightedAverage)
    x = torch.randn(1, 7, 7, 16)
    with torch.no_grad():
        last.weight.zero_()
        assert torch.equal(stack(x), torch.zeros_like(x))
        last.weight[0] = 1.0
        assert torch.equal(stack(x), x)


def test_without_mixers_a_stage_is_the_identity() -> None:
    x = torch.randn(2, 3, 5)
    for averaging in (True, False):
        assert torch.equal(MixerStack([], [], [], averaging)(x), x)


@pytest.mark.parametrize(
    ("block", "size"),
    [("shared_conv", (16, 16)), ("shared_conv", (19, 26)), *[(block, (13, 10)) for block in BLOCKS]],
)
def test_vim2_nano_is_the_paper_written_out(block: str, size: tuple[int, int]) -> None:
    """The model in float32 against float64: error of single precision through nine mixers and their recurrences,
    1e-4 of the scale (measured: 2e-6)."""
    model = randomised(create_model("vim2_nano", num_classes=7, block=block).eval())
    images = torch.randn(2, 3, *size)
    weights: dict[str, Tensor] = {name: p.detach().double() for name, p in model.named_parameters()}
    used: set[str] = set()

    class Recorded(dict[str, Tensor]):
        """Notes what is read, through :func:`by_hand.part` too, so that no parameter goes untested."""

        def __init__(self, values: dict[str, Tensor], prefix: str = "") -> None:
            super().__init__(values)
            self.prefix = prefix

        def __getitem__(self, name: str) -> Tensor:
            used.add(self.prefix + name)
            return super().__getitem__(name)

    def recorded_part(w: by_hand.Weights, prefix: str) -> by_hand.Weights:
        assert isinstance(w, Recorded)
        return Recorded(plain_part(w, prefix), f"{w.prefix}{prefix}.")

    plain_part = by_hand.part
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(by_hand, "part", recorded_part)
        expected = by_hand.vim2(images.double(), Recorded(weights), stages=3, mixers=3, patch=2, window=4)
        assert scaled_error(model(images), expected) < 1e-4
    assert used == weights.keys()
