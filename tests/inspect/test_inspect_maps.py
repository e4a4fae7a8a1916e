"""Averaging matrices and maps of Δ against direct computations, and their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mmtrain.config import load_config
from mmtrain.config.models import preset
from mmtrain.inference.trained import load_trained
from mmtrain.inspect.learned import averaging_matrices, image_selection, step_maps, window_selection
from mmtrain.models import build_model, create_model
from mmtrain.models.averaging import WeightedAverage
from mmtrain.models.mixers import ImageTokenMixer, SequenceMixer
from mmtrain.models.s6 import S6
from mmtrain.plotting.selection import draw_averaging

Picture = Callable[[Path], NDArray[np.uint8]]


def steps_of(ssm: S6, u: Tensor) -> Tensor:
    """Δ by its definition, position by position: u (..., features) → (...) the mean over the features."""
    low_rank = u @ ssm.x_proj.weight.T
    raw = low_rank[..., : ssm.rank] @ ssm.dt_proj.weight.T + ssm.dt_proj.bias
    return torch.log1p(torch.exp(raw)).mean(-1)


def mixer_inputs(model: nn.Module, names: list[str], *args: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0]))
    with torch.no_grad():
        model(*args)
    return seen


# ---------------------------------------------------------------- averaging


def test_matrix_holds_each_weight_in_its_place(tmp_path: Path, picture: Picture) -> None:
    model = create_model("vim2_nano", dims=[4, 8, 8], window=2, num_classes=2, token_mixers=[2, 4, 2])
    averages = [m for m in model.get_submodule("stages.1").modules() if isinstance(m, WeightedAverage)]
    assert len(averages) == 7
    for i, average in enumerate(averages):
        average.weight.data = 10 * i + torch.arange(i + 1.0)
        average.input_copy.data.fill_(0.5)
    first, second, _ = averaging_matrices(model)
    assert (first.name, second.name) == ("stage 1", "stage 2")
    assert second.rows == ["T1", "T2", "C1", "T3", "T4", "C2", "out"]
    assert second.columns == ["x", "T1", "T2", "C1", "T3", "T4", "C2"]
    wanted = np.array([[10 * i + j + 0.5 * (j == 0) if j <= i else np.nan for j in range(7)] for i in range(7)])
    np.testing.assert_array_equal(second.weights, wanted.astype(np.float32))
    assert [second.family(3, j) for j in range(4)] == ["α+β", "α", "α", "β"]
    assert [second.family(5, j) for j in range(4)] == ["θ+γ", "θ", "θ", "γ"]
    assert second.family(6, 1) == ""
    np.testing.assert_array_equal(first.weights[np.tril_indices(4)], 1)
    draw_averaging(tmp_path / "a.png", [first, second])
    picture(tmp_path / "a.png")


def test_stage_output_is_the_weighted_sum_of_the_matrix() -> None:
    """The last row, applied to what the mixers gave, is what the stack gave."""
    torch.manual_seed(0)
    model = create_model("tsm2", lookback=32, horizon=4, dim=8).eval()
    for module in model.modules():
        if isinstance(module, WeightedAverage):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.input_copy)
    blocks = model.get_submodule("blocks")
    outputs: list[Tensor] = []
    blocks.register_forward_pre_hook(lambda m, a: outputs.append(a[0]))
    for i in range(4):
        model.get_submodule(f"blocks.mixers.{i}").register_forward_hook(lambda m, a, y: outputs.append(y))
    given: list[Tensor] = []
    blocks.register_forward_hook(lambda m, a, y: given.append(y))
    with torch.no_grad():
        model(torch.randn(2, 32, 3))
    (matrix,) = averaging_matrices(model)
    total = sum(float(w) * y for w, y in zip(matrix.weights[-1], outputs, strict=True))
    torch.testing.assert_close(given[0], total, atol=1e-5, rtol=1e-5)


def test_a_model_without_averaging_has_no_matrices() -> None:
    assert averaging_matrices(create_model("tsm2", averaging=False)) == []


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("bidirectional", [False, True])
def test_steps_of_series_mixers(bidirectional: bool) -> None:
    torch.manual_seed(1)
    block = "bidirectional" if bidirectional else "unidirectional"
    config = preset("tsm2", lookback=40, horizon=4, patch_size=8, patch_stride=4, dim=8, depth=1, block=block)
    model = build_model(config).eval()
    past = torch.randn(2, 40, 5)
    names = ["blocks.mixers.0", "blocks.mixers.1"]
    maps = step_maps(model, lambda: model(past))
    assert [(m.name, m.stack, m.label) for m in maps] == [(names[0], "blocks", "T1"), (names[1], "blocks", "C1")]
    assert maps[0].steps.shape == (5, 9)  # variates × patches
    assert maps[1].steps.shape == (9, 5)  # patches × variates
    inputs = mixer_inputs(model, names, past)
    for found in maps:
        x = inputs[found.name][0]  # of the first window: (variates, patches, dim)
        sequence = x if found is maps[0] else x.transpose(0, 1)
        wanted = series_steps(cast(SequenceMixer, model.get_submodule(found.name)), sequence)
        torch.testing.assert_close(torch.from_numpy(found.steps), wanted, atol=1e-6, rtol=1e-5)


def series_steps(mixer: SequenceMixer, sequence: Tensor) -> Tensor:
    with torch.no_grad():
        u = mixer.in_proj(sequence).chunk(2, -1)[0].transpose(1, 2)
        directions = []
        for i, ssm in enumerate(mixer.scan.ssm):
            conv = cast(nn.Conv1d, mixer.scan.conv[i])
            pad = conv.kernel_size[0] - 1
            v = u.flip(-1) if i else u
            v = F.silu(F.conv1d(F.pad(v, (pad, 0)), conv.weight, conv.bias, groups=u.shape[1]))
            v = (v.flip(-1) if i else v).transpose(1, 2)
            directions.append(steps_of(cast(S6, ssm), v))
    return torch.stack(directions).mean(0)


@pytest.mark.parametrize("block", ["shared_conv", "multi_scan", "unidirectional"])
def test_steps_of_image_mixers(block: str) -> None:
    """Δ is a function of the token alone, so it can be computed on the grid, with no order of scanning at all."""
    torch.manual_seed(2)
    model = create_model("vim2_nano", dims=[4, 8, 8], window=2, num_classes=2, block=block).eval()
    images = torch.randn(2, 3, 12, 20)
    maps = step_maps(model, lambda: model(images))
    assert [m.stack for m in maps] == [f"stages.{i}" for i in (0, 0, 1, 1, 2, 2)]
    assert [m.steps.shape for m in maps[::2]] == [(6, 10), (3, 5), (2, 3)]
    inputs = mixer_inputs(model, [m.name for m in maps], images)
    for found in maps:
        mixer = cast(ImageTokenMixer, model.get_submodule(found.name))
        with torch.no_grad():
            u = mixer.in_proj(inputs[found.name]).chunk(2, -1)[0].permute(0, 3, 1, 2)
            grids = [F.silu(conv(u)).permute(0, 2, 3, 1)[0] for conv in mixer.conv]
            each = [steps_of(cast(S6, ssm), grids[i % len(grids)]) for i, ssm in enumerate(mixer.ssm)]
        wanted = torch.stack(each).mean(0)
        assert wanted.std() > 0
        torch.testing.assert_close(torch.from_numpy(found.steps), wanted, atol=1e-6, rtol=1e-5)


def test_hooks_are_gone_afterwards() -> None:
    model = create_model("tsm2", lookback=32, horizon=4, dim=8).eval()
    step_maps(model, lambda: model(torch.randn(1, 32, 2)))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- selections of trained runs


def test_window_of_a_run_and_of_a_file(series_run: Path, waves: Path) -> None:
    trained = load_trained(series_run)
    last = window_selection(trained)
    rows = waves.read_text().splitlines()[1:]
    assert last.columns == ["a", "b", "c"]
    # the last window of the test split ends a horizon before the end of the table
    assert str(last.time[-1].astype("datetime64[h]")) == rows[-25].split(",")[0]
    np.testing.assert_allclose(last.past[-1], [float(v) for v in rows[-25].split(",")[1:]], atol=1e-4)
    assert last.starts.tolist() == [0, 8, 16, 24, 32]
    assert [m.steps.shape for m in last.maps] == [(3, 5), (5, 3)] * 2
    at_end = window_selection(trained, series=waves)
    assert str(at_end.time[-1].astype("datetime64[h]")) == rows[-1].split(",")[0]
    assert np.abs(at_end.maps[0].steps - last.maps[0].steps).max() > 0


def test_image_of_a_run_and_of_a_file(vision_run: Path, digits: Path, tmp_path: Path) -> None:
    trained = load_trained(vision_run)
    first = image_selection(trained, load_config(vision_run / "config.yaml", [f"data.root={digits}"]))
    assert first.image.shape == (16, 16, 3)
    assert [m.steps.shape for m in first.maps] == [(8, 8)] * 2 + [(4, 4)] * 2 + [(2, 2)] * 2
    file = tmp_path / "digit.png"
    Image.fromarray((first.image * 255).round().astype(np.uint8)).save(file)
    again = image_selection(trained, image=file)
    assert again.what == "digit.png"
    np.testing.assert_allclose(again.image, first.image, atol=1e-6)
    for a, b in zip(first.maps, again.maps, strict=True):
        np.testing.assert_allclose(a.steps, b.steps, rtol=1e-4)
