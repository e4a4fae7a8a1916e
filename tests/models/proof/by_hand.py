"""ViM2 written out from the paper's equations in float64: no module of mmtrain's is called, only weights are read.

Every function takes the weights of one part as a dictionary by name, and the input as the modules do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def part(weights: Weights, prefix: str) -> Weights:
    """The weights under ``prefix``, without it."""
    return {name.removeprefix(f"{prefix}."): w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def norm(x: Tensor, w: Weights) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * w["weight"] + w["bias"]


def s6(x: Tensor, w: Weights) -> Tensor:
    """Section 1: x (B, L, D), one position after the other."""
    state = w["A_log"].shape[1]
    rank = w["dt_proj.weight"].shape[1]
    low, b, c = (x @ w["x_proj.weight"].T).split([rank, state, state], -1)
    step = F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    a = -w["A_log"].exp()
    h = x.new_zeros(x.shape[0], x.shape[2], state)
    out = []
    for t in range(x.shape[1]):
        h = (step[:, t, :, None] * a).exp() * h + (step[:, t] * x[:, t])[..., None] * b[:, t, None]
        out.append((h * c[:, t, None]).sum(-1) + w["D"] * x[:, t])
    return torch.stack(out, 1)


def causal_conv(x: Tensor, w: Weights) -> Tensor:
    """x (B, L, D): the last tap on the current position, zeros before the start."""
    taps = w["weight"].shape[-1]
    out = w["bias"].expand_as(x)
    for k in range(taps):
        lag = taps - 1 - k
        moved = torch.cat([x.new_zeros(x.shape[0], lag, x.shape[2]), x], 1)[:, : x.shape[1]]
        out = out + moved * w["weight"][:, 0, k]
    return out


def count(w: Weights, prefix: str) -> int:
    """How many parts ``prefix.0``, ``prefix.1``, … there are."""
    return len({name.split(".")[1] for name in w if name.startswith(f"{prefix}.")})


def token_mixer(x: Tensor, w: Weights) -> Tensor:
    """Fig. 1, 6, 7, 8: x (B, H, W, C); one, two or four orders of the grid, put back, averaged, normalised, gated."""
    u, gate = (x @ w["in_proj.weight"].T).chunk(2, -1)
    convolved = []
    for i in range(count(w, "conv")):
        conv = part(w, f"conv.{i}")
        grid = F.conv2d(u.permute(0, 3, 1, 2), conv["weight"], conv["bias"], padding=1, groups=u.shape[-1])
        convolved.append(F.silu(grid).permute(0, 2, 3, 1).flatten(1, 2))
    places = torch.arange(u.shape[1] * u.shape[2]).view(u.shape[1:3])
    rows, columns = places.flatten(), places.T.flatten()
    orders = [rows, rows.flip(0), columns, columns.flip(0)][: count(w, "ssm")]
    total = torch.zeros_like(convolved[0])
    for i, order in enumerate(orders):
        tokens = convolved[i if len(convolved) > 1 else 0]
        total[:, order] += s6(tokens[:, order], part(w, f"ssm.{i}")) / len(orders)
    y = norm(total.view(u.shape), part(w, "norm"))
    return y * F.silu(gate) @ w["out_proj.weight"].T


def channel_mixer(x: Tensor, w: Weights, window: int) -> Tensor:
    """x (B, H, W, C): window by window, the sequence along the channels, its features the window's tokens.

    The second pair of scans, if there is one, takes the tokens of a window column by column.
    """
    u, gate = (x @ w["in_proj.weight"].T).chunk(2, -1)
    mixed = torch.zeros_like(u)
    places = torch.arange(window * window).view(window, window)
    orders = [places.flatten(), places.T.flatten()][: count(w, "scans")]
    for top in range(0, u.shape[1], window):
        for left in range(0, u.shape[2], window):
            tile = u[:, top : top + window, left : left + window]
            full = u.new_zeros(u.shape[0], window, window, u.shape[-1])
            full[:, : tile.shape[1], : tile.shape[2]] = tile
            y = torch.zeros_like(full).flatten(1, 2)
            for j, order in enumerate(orders):
                sequence = full.flatten(1, 2)[:, order].transpose(1, 2)
                for i, turned in enumerate((sequence, sequence.flip(1))):
                    conv, ssm = part(w, f"scans.{j}.conv.{i}"), part(w, f"scans.{j}.ssm.{i}")
                    found = s6(F.silu(causal_conv(turned, conv)), ssm)
                    y[:, order] += (found.flip(1) if i else found).transpose(1, 2) / (2 * len(orders))
            mixed[:, top : top + window, left : left + window] = y.view(full.shape)[:, : tile.shape[1], : tile.shape[2]]
    return norm(mixed, part(w, "norm")) * F.silu(gate) @ w["out_proj.weight"].T


def average(outputs: list[Tensor], w: Weights) -> Tensor:
    """Section 2: y⁰_Token = y⁰_Channel = x, so the stage's input enters with two weights."""
    total = w["input_copy"] * outputs[0]
    for weight, y in zip(w["weight"], outputs, strict=True):
        total = total + weight * y
    return total


def stage(x: Tensor, w: Weights, mixers: int, window: int) -> Tensor:
    """Two token mixers, then one channel mixer, again and again; a last average."""
    outputs = [x]
    for i in range(mixers):
        y = norm(average(outputs, part(w, f"averages.{i}")), part(w, f"norms.{i}"))
        own = part(w, f"mixers.{i}")
        outputs.append(channel_mixer(y, own, window) if i % 3 == 2 else token_mixer(y, own))
    return average(outputs, part(w, f"averages.{mixers}"))


def merge(x: Tensor, w: Weights) -> Tensor:
    """Down-sampling: the four of each 2×2 square joined (column by column, as in Swin), normalised, projected."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    joined = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
    return norm(joined, part(w, "norm")) @ w["proj.weight"].T


def vim2(x: Tensor, w: Weights, stages: int, mixers: int, patch: int, window: int) -> Tensor:
    """Stem → stages → norm → mean over the tokens → head: images x (B, C, H, W) → logits."""
    x = F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch))
    tokens = F.conv2d(x, w["stem.weight"], w["stem.bias"], stride=patch).permute(0, 2, 3, 1)
    y = norm(tokens, part(w, "stem_norm"))
    for i in range(stages):
        y = stage(merge(y, part(w, f"downs.{i - 1}")) if i else y, part(w, f"stages.{i}"), mixers, window)
    return norm(y, part(w, "norm")).mean((1, 2)) @ w["head.weight"].T + w["head.bias"]
