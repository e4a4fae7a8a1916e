"""The learned weights α, β, θ, γ of the weighted averaging, as matrices and as heat maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mmtrain.models.averaging import MixerStack
from mmtrain.models.kinds import mixer_labels

#: Up to so many rows every weight is written into its cell.
_ANNOTATED = 10
_TOKEN, _CHANNEL = "#1f6f8b", "#b5541c"


@dataclass(frozen=True)
class AveragingMatrix:
    """The weights of one stack of mixers (a stage of ViM2, or all of TSM2).

    ``weights`` (rows, columns) float32: row i is the input of mixer ``rows[i]`` (the last one, ``out``, the stack's
    output), column j the earlier output ``columns[j]`` (the first one, ``x``, the stack's input); NaN where j is not
    earlier than i. The input's column is the sum of its two copies, y⁰_Token = y⁰_Channel = x.
    """

    name: str
    rows: list[str]
    columns: list[str]
    weights: NDArray[np.float32]

    def family(self, row: int, column: int) -> str:
        """The paper's letter: α, β (input of a token mixer), θ, γ (of a channel mixer); none for the output.

        The input's column holds both letters' weights, of its two copies.
        """
        token, channel = {"T": ("α", "β"), "C": ("θ", "γ")}.get(self.rows[row][0], ("", ""))
        if not token:
            return ""
        return {"T": token, "C": channel}.get(self.columns[column][0], f"{token}+{channel}")


def averaging_matrices(model: nn.Module) -> list[AveragingMatrix]:
    """The weights of every :class:`MixerStack` in ``model``; none for a model that was made without averaging."""
    found = []
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, MixerStack) and len(m.averages)]
    for number, (name, stack) in enumerate(stacks, 1):
        labels = mixer_labels(stack.mixers)
        size = len(stack.averages)
        weights = np.full((size, size), np.nan, np.float32)
        for i, average in enumerate(stack.averages):
            row = average.get_parameter("weight").detach().float().cpu().numpy().copy()
            row[0] += float(average.get_parameter("input_copy").detach())
            weights[i, : len(row)] = row
        title = f"stage {number}" if name.startswith("stages.") else name
        found.append(AveragingMatrix(title, [*labels, "out"], ["x", *labels], weights))
    return found


def draw_averaging(path: Path, matrices: list[AveragingMatrix]) -> None:
    """One heat map a stack in one colour scale, centred at the weights' initial value 1.

    Args:
        path: the PNG to write.
        matrices: what :func:`averaging_matrices` found, at least one.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    distance = max(float(np.nanmax(np.abs(m.weights - 1))) for m in matrices)
    distance = max(distance, 1e-3)  # fresh weights: all 1
    norm = TwoSlopeNorm(1.0, 1 - distance, 1 + distance)
    sizes = [_inches(m) for m in matrices]
    width, height = max(8.0, sum(sizes) + 1.2 * len(sizes) + 1), max(sizes) + 1.7
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False, width_ratios=sizes)[0]
    for axis, matrix in zip(axes, matrices, strict=True):
        axis.imshow(matrix.weights, cmap="RdBu_r", norm=norm)
        axis.set_title(matrix.name, fontsize=10)
        for ticks, names in ((axis.set_xticks, matrix.columns), (axis.set_yticks, matrix.rows)):
            small = {"rotation": 90} if ticks == axis.set_xticks and len(names) > _ANNOTATED else {}
            ticks(range(len(names)), names, fontsize=8, **small)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_color({"T": _TOKEN, "C": _CHANNEL}.get(label.get_text()[:1], "black"))
        axis.spines[:].set_visible(False)
        if len(matrix.rows) <= _ANNOTATED:
            _annotate(axis, matrix, distance)
    axes[0].set_ylabel("the input of …")
    figure.supxlabel("… is the sum of the earlier outputs, each with its weight", fontsize=10)
    figure.suptitle(
        "rows of token mixers: α × token, β × channel outputs; rows of channel mixers: θ × token, γ × channel outputs",
        fontsize=10,
    )
    figure.colorbar(ScalarMappable(norm, "RdBu_r"), ax=list(axes), shrink=0.8, label="weight (1 at the start)")
    figure.savefig(path, dpi=110)


def _inches(matrix: AveragingMatrix) -> float:
    cells = len(matrix.rows)
    return cells * (0.55 if cells <= _ANNOTATED else 0.3) + 0.4


def _annotate(axis: object, matrix: AveragingMatrix, distance: float) -> None:
    for i, row in enumerate(matrix.weights):
        for j, weight in enumerate(row):
            if np.isnan(weight):
                continue
            dark = abs(weight - 1) > 0.6 * distance
            text = f"{matrix.family(i, j)}\n{weight:.2f}".strip()
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if dark else "black"}
            axis.text(j, i, text, **style)  # type: ignore[attr-defined]
