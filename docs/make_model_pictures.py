"""Draw the pictures of docs/models.md: diagrams of the architectures, and the learned weights and step sizes of runs.

    python docs/make_model_pictures.py [RUN ...] [--out docs/images]

RUN is the folder of a finished run of ViM2 or TSM2, whose data must exist. Without runs, only the diagrams are drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINEAR, _CONV, _SCAN, _GATE, _PLAIN = "#dbe7f3", "#fde8c8", "#f6c9c0", "#e3edd2", "#eeeeee"
Spot = tuple[float, float]


def _canvas(width: float, height: float, title: str) -> Axes:
    """Return empty axes whose unit is one inch."""
    from matplotlib.figure import Figure

    axis = Figure(figsize=(width, height)).add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    axis.text(width / 2, height - 0.22, title, ha="center", va="center", fontsize=12, weight="bold")
    return axis


def _save(axis: Axes, path: Path) -> None:
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=110)


def _box(axis: Axes, at: Spot, text: str, color: str = _PLAIN, width: float = 1.5, height: float = 0.42) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (at[0] - width / 2, at[1] - height / 2)
    style = "round,pad=0,rounding_size=0.07"
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=color, ec="#555555", lw=0.9))
    axis.text(*at, text, ha="center", va="center", fontsize=8.5)


def _path(axis: Axes, *spots: Spot, arrow: bool = True) -> None:
    """Draw a line through ``spots``, with an arrowhead at the last one."""
    for a, b in pairwise(spots[:-1]):
        axis.plot(*zip(a, b, strict=True), color="#333333", lw=1, solid_capstyle="round")
    style = {"arrowstyle": "-|>" if arrow else "-", "color": "#333333", "lw": 1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", spots[-1], spots[-2], arrowprops=style)


def _note(axis: Axes, at: Spot, text: str, **options: object) -> None:
    axis.text(*at, text, **{"fontsize": 8, "ha": "left", "va": "center", "color": "#444444", **options})  # type: ignore[arg-type]


def _mixer(axis: Axes, left: float, title: str, steps: Sequence[tuple[str, str]], notes: Sequence[str]) -> None:
    """Draw one mixer from bottom to top, with the scanned path at ``left`` + 1 and the gate at ``left`` + 2.9."""
    path, gate, low, pitch = left + 1.0, left + 2.9, 1.0, 0.72
    axis.text(left + 1.9, 5.32, title, ha="center", fontsize=10, weight="bold")
    _path(axis, (left + 1.9, 0.35), (left + 1.9, 0.6), arrow=False)
    _path(axis, (left + 1.9, 0.6), (path, 0.6), (path, low - 0.21))
    _path(axis, (left + 1.9, 0.6), (gate, 0.6), (gate, low - 0.21))
    for i, (text, color) in enumerate(steps):
        _box(axis, (path, low + i * pitch), text, color, 1.75)
        _path(axis, (path, low + i * pitch + 0.21), (path, low + (i + 1) * pitch - 0.21))
    _box(axis, (gate, low), "Linear", _LINEAR)
    _path(axis, (gate, low + 0.21), (gate, low + pitch - 0.21))
    _box(axis, (gate, low + pitch), "SiLU (the gate)", _GATE)
    top = low + len(steps) * pitch
    _box(axis, (path, top), "⊗", _GATE, 0.5)
    _path(axis, (gate, low + pitch + 0.21), (gate, top), (path + 0.25, top))
    _path(axis, (path, top + 0.21), (path, top + pitch - 0.21))
    _box(axis, (path, top + pitch), "Linear", _LINEAR, 1.75)
    _path(axis, (path, top + pitch + 0.21), (path, top + pitch + 0.55))
    for i, note in enumerate(notes):
        _note(axis, (gate + 0.1, low + (i + 2) * pitch), note)
    _note(axis, (left + 1.9, 0.2), "x, normalised", ha="center")


def draw_block(path: Path) -> None:
    axis = _canvas(13.9, 6.0, "The MambaMixer block")
    _mixer(
        axis,
        0.1,
        "selective token mixer",
        [
            ("Linear, D → 2D", _LINEAR),
            ("depthwise conv, SiLU", _CONV),
            ("mean of d S6 scans", _SCAN),
            ("norm (ViM2)", _PLAIN),
        ],
        ["the sequence runs\nalong the tokens", "d = 1: a Mamba block\nd = 4: cross-scan"],
    )
    _mixer(
        axis,
        4.75,
        "selective channel mixer",
        [
            ("Linear, D → eD", _LINEAR),
            ("conv per direction, SiLU", _CONV),
            ("mean of S6 → and S6 ←", _SCAN),
            ("norm (ViM2)", _PLAIN),
        ],
        ["the sequence runs\nalong the channels", "two directions: channels\nhave no causal order"],
    )
    left, low = 9.95, 0.6
    axis.text(left + 1.7, 5.32, "weighted averaging, no residuals", ha="center", fontsize=10, weight="bold")
    names = ["x", "T1", "T2", "C1"]
    for i, name in enumerate(names):
        color = {"x": _PLAIN, "T": _LINEAR, "C": _SCAN}[name[0]]
        _box(axis, (left + 0.35 + i * 0.95, low + i * 1.15), name if i else "x, the input", color, 0.8 if i else 1.0)
        if i == 0:
            continue
        for j in range(i):  # an arrow for the weight of each earlier output
            x = left + 0.35 + j * 0.95
            y = low + i * 1.15 - 0.12 + 0.08 * j
            _path(axis, (x, low + j * 1.15 + 0.21), (x, y), (left + 0.35 + i * 0.95 - 0.4, y))
    _path(axis, (left + 3.2, low + 3.45 + 0.21), (left + 3.2, low + 4.15))
    _note(axis, (left + 3.1, low + 4.3), "out, one more such sum", ha="right")
    _note(
        axis,
        (left + 1.35, 1.0),
        "each arrow is a learned scalar:\nα, β into token mixers T,\nθ, γ into channel mixers C",
        fontsize=8.5,
    )
    _save(axis, path)


def draw_vim2(path: Path) -> None:
    from mmtrain.config.models import ViM2Config, preset

    size = preset("vim2_tiny")
    assert isinstance(size, ViM2Config)
    axis = _canvas(12.6, 3.1, "ViM2: an image becomes a pyramid of features (vim2_tiny at 224 × 224)")
    side = 224 // size.patch_size
    _box(axis, (0.75, 1.8), "image\n224×224×3", _PLAIN, 1.1, 0.7)
    _path(axis, (1.3, 1.8), (1.5, 1.8))
    _box(
        axis,
        (2.1, 1.8),
        f"stem: conv {size.patch_size}×{size.patch_size}\nstride {size.patch_size}, norm",
        _CONV,
        1.2,
        0.7,
    )
    for i, (dim, tokens) in enumerate(zip(size.dims, size.token_mixers, strict=True)):
        x = 3.6 + i * 2.05
        _path(axis, (x - 0.9, 1.8), (x - 0.75, 1.8))
        down = "" if i == 0 else "2× patch merging\n"
        text = f"stage {i + 1}\n{down}[T T C] × {tokens // 2}\n{side}×{side}×{dim}"
        _box(axis, (x, 1.8), text, _SCAN, 1.5, 1.2)
        if i < 3:
            _path(axis, (x + 0.75, 1.8), (x + 1.15, 1.8), arrow=False)
            side = -(-side // 2)
    _path(axis, (10.5, 1.8), (10.8, 1.8))
    _box(axis, (11.55, 1.8), "norm, mean over\nthe tokens,\nlinear head", _GATE, 1.5, 0.9)
    _note(
        axis,
        (1.5, 0.55),
        "T: token mixer, cross-scan in four directions over the 2-D grid     C: channel mixer, two scans along the"
        " channels of every 7×7 window\nwithin a stage every mixer reads its own weighted average of all earlier"
        " outputs of that stage",
        fontsize=9,
    )
    _save(axis, path)


def draw_tsm2(path: Path) -> None:
    axis = _canvas(12.6, 3.1, "TSM2: M series become one forecast each")
    parts = [
        ("past\nM × 512", _PLAIN, 1.0),
        ("window norm\nper variate", _PLAIN, 1.2),
        ("patches 16, stride 8\nLinear 16 → D", _LINEAR, 1.5),
        ("time mixer\nalong the patches\none direction", _SCAN, 1.4),
        ("variate mixer\nalong the variates\ntwo directions", _SCAN, 1.45),
        ("weighted sum,\n2-D norm", _PLAIN, 1.2),
        ("Linear, the patches\nflattened → horizon", _LINEAR, 1.5),
        ("undo the\nwindow norm", _PLAIN, 1.1),
    ]
    x, gap, edges = 0.2, 0.28, []
    for i, (text, color, width) in enumerate(parts):
        if i:
            _path(axis, (x - gap, 1.8), (x, 1.8))
        _box(axis, (x + width / 2, 1.8), text, color, width, 0.95)
        edges.append((x, x + width))
        x += width + gap
    left, right = edges[3][0] - 0.1, edges[4][1] + 0.1
    axis.plot([left, left, right, right, left], [1.2, 2.4, 2.4, 1.2, 1.2], color="#888888", lw=0.9, ls="--")
    _note(axis, ((left + right) / 2, 1.03), "× depth (2)", ha="center", fontsize=9)
    _note(
        axis,
        (0.3, 0.5),
        "the tokens are M × patches × D all the way: the time mixer treats every variate as a sequence of patches, the"
        " variate mixer every patch as a sequence of variates\nthe norm before each mixer runs over time and features"
        " at once; no weight depends on M",
        fontsize=9,
    )
    _save(axis, path)


def draw_run(run: Path, out: Path) -> list[Path]:
    """Draw the averaging weights and the step sizes of a finished run. Return the files."""
    from mmtrain.inference.trained import load_trained
    from mmtrain.inspect.learned import averaging_matrices, image_selection, window_selection
    from mmtrain.plotting.selection import draw_averaging, draw_image_selection, draw_window_selection

    trained = load_trained(run)
    images = trained.config.task.kind == "classification"
    kind = "vim2" if images else "tsm2"
    weights, selected = out / f"models_averaging_{kind}.png", out / f"models_selection_{kind}.png"
    draw_averaging(weights, averaging_matrices(trained.model))
    if images:
        draw_image_selection(selected, image_selection(trained))
    else:
        draw_window_selection(selected, window_selection(trained))
    return [weights, selected]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in (("block", draw_block), ("vim2", draw_vim2), ("tsm2", draw_tsm2)):
        files.append(args.out / f"models_{name}.png")
        draw(files[-1])
    for run in args.runs:
        files += draw_run(run, args.out)
    for path in files:
        print(path)


if __name__ == "__main__":
    main()
