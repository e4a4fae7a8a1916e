"""Arguments of the public operators that are no tensors: a TypeError that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.errors import UserError
from mmtrain.ops import (
    Direction,
    causal_conv1d,
    keyed_dropout,
    linear,
    selective_mix,
    selective_scan,
    weighted_sum,
)

X, W = torch.zeros(2, 5, 11), torch.zeros(5, 5)
DIRECTION = Direction(torch.zeros(8, 11), torch.zeros(11, 2), torch.zeros(11), torch.zeros(11, 3), torch.zeros(11))


def small(**replaced: Any) -> dict[str, Any]:
    rows = torch.zeros(2, 3, 11)
    return {"u": X, "delta": X, "A": torch.zeros(5, 3), "B": rows, "C": rows} | replaced


NOT_A_TENSOR: list[tuple[Callable[[], Any], str]] = [
    (lambda: selective_scan(**small(u=None)), "selective_scan: u must be a tensor, got NoneType"),
    (lambda: selective_scan(**small(delta=None)), "selective_scan: delta must be a tensor"),
    (lambda: selective_scan(**small(A=np.zeros((5, 3)))), "selective_scan: A must be a tensor, got ndarray"),
    (lambda: selective_scan(**small(B=None)), "selective_scan: B must be a tensor"),
    (lambda: selective_scan(**small(C=[1.0])), "selective_scan: C must be a tensor, got list"),
    (lambda: causal_conv1d(None, W), "causal_conv1d: x must be a tensor"),  # type: ignore[arg-type]
    (lambda: causal_conv1d(X, None), "causal_conv1d: weight must be a tensor"),  # type: ignore[arg-type]
    (lambda: selective_mix(None, [DIRECTION]), "selective_mix: x must be a tensor"),  # type: ignore[arg-type]
    (lambda: selective_mix(X, [DIRECTION._replace(A=None)]), r"selective_mix: directions\[0\]\.A must be a tensor"),
    (lambda: linear(None, W), "linear: x must be a tensor"),  # type: ignore[arg-type]
    (lambda: linear(X, None), "linear: weight must be a tensor"),  # type: ignore[arg-type]
    (lambda: keyed_dropout(None, W, 0.5), "keyed_dropout: x must be a tensor"),  # type: ignore[arg-type]
    (lambda: keyed_dropout(X, 3, 0.5), "keyed_dropout: seeds must be a tensor"),  # type: ignore[arg-type]
    (lambda: weighted_sum([X, None], W), r"weighted_sum: tensors\[1\] must be a tensor"),  # type: ignore[list-item]
    (lambda: weighted_sum([X], None), "weighted_sum: weight must be a tensor"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), NOT_A_TENSOR, ids=[message for _, message in NOT_A_TENSOR])
def test_what_is_no_tensor_is_a_type_error_with_its_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert isinstance(caught.value, UserError)
