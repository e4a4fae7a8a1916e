"""Print the norms of activations and gradients in deep stacks of mixers at initialisation, layer by layer.

python benchmarks/deep_norms.py --mixers 200
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.models import create_model
from mmtrain.models.averaging import MixerStack
from mmtrain.models.tsm2 import TSM2
from mmtrain.models.vim2 import ViM2


@dataclass(frozen=True)
class Norms:
    """Norms with one entry per mixer, in order.

    Attributes:
        kinds: Class names of the mixers.
        stream: Root mean square of the input of each mixer's norm. The last, additional entry is the stage's output.
        output: Root mean square of each mixer's output.
        output_gradient: Norm of the loss's gradient with respect to each mixer's output.
        weight_gradient: Norm of the loss's gradient with respect to each mixer's ``in_proj`` weight.
    """

    kinds: list[str]
    stream: Tensor
    output: Tensor
    output_gradient: Tensor
    weight_gradient: Tensor

    def ratio(self, values: Tensor, kind: str | None = None) -> float:
        """Return the largest of ``values`` (one per mixer) divided by the smallest, for all mixers or one class."""
        chosen = values[[i for i, found in enumerate(self.kinds) if kind in (None, found)]]
        return (chosen.max() / chosen.min()).item()


def measure(stack: MixerStack, x: Tensor) -> Norms:
    """Return the norms of one forward and backward pass of Σ r·LayerNorm(stack(x)) with random r.

    The gradients resemble those of a head after a norm.
    """
    streams: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep_stream(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        streams.append(inputs[0].detach())

    def keep_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    hooks = [norm.register_forward_pre_hook(keep_stream) for norm in stack.norms]
    hooks += [mixer.register_forward_hook(keep_output) for mixer in stack.mixers]
    stack.zero_grad(set_to_none=True)
    y = stack(x)
    for hook in hooks:
        hook.remove()
    streams.append(y.detach())
    (F.layer_norm(y, y.shape[-1:]) * torch.randn_like(y)).sum().backward()
    return Norms(
        kinds=[type(mixer).__name__ for mixer in stack.mixers],
        stream=torch.stack([_rms(s) for s in streams]),
        output=torch.stack([_rms(o.detach()) for o in outputs]),
        output_gradient=torch.stack([cast(Tensor, o.grad).norm() for o in outputs]),
        weight_gradient=torch.stack([cast(Any, mixer).in_proj.weight.grad.norm() for mixer in stack.mixers]),
    )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def forecaster(mixers: int, dim: int = 32) -> tuple[MixerStack, Tensor]:
    """Return the stack of a TSM2 with ``mixers`` mixers (half of them time mixers), and noise (2, 5, 15, dim)."""
    model = cast(TSM2, create_model("tsm2", depth=mixers // 2, dim=dim, lookback=128, dropout=0.0))
    with torch.no_grad():
        return model.blocks, model.embed(torch.randn(2, 5, 128).unfold(-1, 16, 8))


def image_stage(mixers: int, dim: int = 64) -> tuple[MixerStack, Tensor]:
    """Return a ViM2 stage with ``mixers`` mixers (two thirds of them token mixers), and noise (2, 14, 14, dim)."""
    sizes: dict[str, Any] = {"dims": [dim], "token_mixers": [mixers // 3 * 2], "channel_expand": [2]}
    model = cast(ViM2, create_model("vim2_small", **sizes, drop_path=0.0))
    return cast(MixerStack, model.stages[0]), torch.randn(2, 14, 14, dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mixers", type=int, default=200, help="mixers of the forecaster")
    parser.add_argument(
        "--image-mixers", type=int, default=27, help="mixers of the image stage (27 in stage 3 of ViM2-S)"
    )
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rows", type=int, default=28, help="printed rows per table, evenly spaced")
    given = parser.parse_args()
    torch.manual_seed(0)
    stacks = {
        f"TSM2, {given.mixers} mixers": forecaster(given.mixers, given.dim),
        f"ViM2 stage, {given.image_mixers} mixers": image_stage(given.image_mixers, given.dim),
    }
    for name, (stack, x) in stacks.items():
        found = measure(stack, x)
        print(f"{name}, dim {given.dim}: rms of stream and output; norms of the gradients of output and in_proj")
        print(f"{'':>4} {'mixer':<18} {'stream':>8} {'output':>8} {'d output':>9} {'d in_proj':>9}")
        count = len(found.kinds)
        for i in sorted({round(k * (count - 1) / max(given.rows - 1, 1)) for k in range(given.rows)}):
            values = (found.stream, found.output, found.output_gradient, found.weight_gradient)
            stream, output, at_output, at_weight = (v[i].item() for v in values)
            print(f"{i:>4} {found.kinds[i]:<18} {stream:>8.3f} {output:>8.4f} {at_output:>9.2f} {at_weight:>9.2f}")
        print(f"     end of the stack   {found.stream[-1].item():>8.3f}")
        print(f"largest / smallest norm of output gradients: {found.ratio(found.output_gradient):.2f}\n")


if __name__ == "__main__":
    main()
