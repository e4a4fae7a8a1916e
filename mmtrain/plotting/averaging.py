"""Heat maps of the learned weights α, β, θ, γ of the weighted averaging."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmtrain.plotting import new_figure, save

#: The weights are written into their cells up to this number of rows.
_ANNOTATED = 10
_LABEL_COLORS = {"T": "#1f6f8b", "C": "#b5541c"}


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


def draw_averaging(path: Path, matrices: list[AveragingMatrix]) -> None:
    """One heat map for each stack, all in one colour scale, which is centred at the weights' initial value 1.

    Args:
        path: the PNG to write.
        matrices: at least one.
    """
    # fresh weights are all 1
    distance = max(1e-3, *(float(np.nanmax(np.abs(m.weights - 1))) for m in matrices))
    cells = [len(m.rows) for m in matrices]
    sizes = [count * (0.55 if count <= _ANNOTATED else 0.3) + 0.4 for count in cells]
    figure = new_figure(max(8.0, sum(sizes) + 1.2 * len(sizes) + 1), max(sizes) + 1.7)
    axes = figure.subplots(1, len(matrices), squeeze=False, width_ratios=sizes)[0]
    for axis, matrix, count in zip(axes, matrices, cells, strict=True):
        image = axis.imshow(matrix.weights, cmap="RdBu_r", vmin=1 - distance, vmax=1 + distance)
        axis.set_title(matrix.name, fontsize=10)
        axis.set_xticks(range(count), matrix.columns, fontsize=8, rotation=90 if count > _ANNOTATED else 0)
        axis.set_yticks(range(count), matrix.rows, fontsize=8)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_color(_LABEL_COLORS.get(label.get_text()[:1], "black"))
        axis.spines[:].set_visible(False)
        if count > _ANNOTATED:
            continue
        for i, j in np.argwhere(np.isfinite(matrix.weights)):
            weight = matrix.weights[i, j]
            color = "white" if abs(weight - 1) > 0.6 * distance else "black"
            text = f"{matrix.family(i, j)}\n{weight:.2f}".strip()
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axes[0].set_ylabel("the input of …")
    figure.supxlabel("… is the sum of the earlier outputs, each with its weight", fontsize=10)
    figure.suptitle(
        "rows of token mixers: α × token, β × channel outputs; rows of channel mixers: θ × token, γ × channel outputs",
        fontsize=10,
    )
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="weight (1 at the start)")
    save(figure, path)
