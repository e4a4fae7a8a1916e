"""The models: the paper's sizes, shapes, causality, and the special cases that must hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmtrain.errors import UserError
from mmtrain.models import create_model, list_models
from mmtrain.models.averaging import MixerStack
from mmtrain.models.mixers import ImageChannelMixer, ImageTokenMixer, SequenceMixer
from mmtrain.models.s6 import S6
from mmtrain.models.tsm2 import TimeMixer, VariateMixer


@pytest.mark.parametrize(("name", "millions"), [("vim2_tiny", 24.1), ("vim2_small", 43.8), ("vim2_base", 75.8)])
def test_parameters_are_those_of_our_reading_of_the_paper(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("size", [(32, 32), (30, 45), (7, 64), (2, 2)])
def test_vim2_takes_any_image_size(size: tuple[int, int]) -> None:
    model = create_model("vim2_nano", num_classes=5)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variates", [1, 3, 21])
def test_tsm2_takes_any_number_of_variates(variates: int) -> None:
    model = create_model("tsm2", lookback=96, horizon=24, dim=8, linear_path=True)
    future = model(torch.randn(2, 96, variates))
    assert future.shape == (2, 24, variates)
    future.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_tsm2_forecasts_move_with_the_level_of_the_series() -> None:
    model = create_model("tsm2", lookback=64, horizon=8, dim=8, window_norm="mean").eval()
    past = torch.randn(2, 64, 3)
    torch.testing.assert_close(model(past + 50), model(past) + 50, rtol=1e-4, atol=1e-3)


def test_the_time_mixer_is_causal_and_the_variate_mixer_is_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 9, 8)
    moved = x.clone()
    moved[:, :, 6:] += 1
    time = TimeMixer(8)
    torch.testing.assert_close(time(moved)[:, :, :6], time(x)[:, :, :6])
    assert not torch.allclose(time(moved)[:, :, 6:], time(x)[:, :, 6:])
    moved = x.clone()
    moved[:, 3] += 1
    variate = VariateMixer(8, bidirectional=True)
    changed = (variate(moved) - variate(x)).abs().amax(dim=(0, 2, 3))
    assert (changed > 1e-6).all()


def test_a_one_directional_mixer_is_the_mamba_block() -> None:
    """Written out from the Mamba paper's block: projections, causal convolution, SiLU, S6, gate, projection."""
    torch.manual_seed(0)
    mixer = SequenceMixer(16)
    x = torch.randn(2, 11, 16)
    u, z = mixer.in_proj(x).chunk(2, -1)
    conv, s6 = mixer.scan.conv[0], mixer.scan.ssm[0]
    u = nn.functional.silu(nn.functional.conv1d(u.mT, conv.weight, conv.bias, padding=3, groups=32)[..., :11])
    dt, b, c = s6.x_proj(u.mT).split([s6.rank, 16, 16], -1)
    step = nn.functional.softplus(s6.dt_proj(dt))
    state, outputs = torch.zeros(2, 32, 16), []
    for t in range(11):
        a = torch.exp(step[:, t, :, None] * -torch.exp(s6.A_log))
        state = a * state + step[:, t, :, None] * b[:, t, None] * u[:, :, t, None]
        outputs.append((state * c[:, t, None]).sum(-1) + s6.D * u[:, :, t])
    expected = mixer.out_proj(torch.stack(outputs, 1) * nn.functional.silu(z))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


def test_steps_start_in_mambas_range() -> None:
    step = nn.functional.softplus(S6(4096).dt_proj.bias)
    assert step.min() >= 1e-4 * 0.99
    assert step.max() <= 0.1 * 1.01
    # log-uniform in [1e-3, 1e-1]: the median is 1e-2
    assert step.log10().median().item() == pytest.approx(-2, abs=0.1)


def test_a_weighted_average_starts_as_the_residual_stream() -> None:
    torch.manual_seed(0)
    mixers = [nn.Linear(6, 6) for _ in range(4)]
    stack = MixerStack(mixers, [nn.LayerNorm(6) for _ in mixers], [nn.Identity() for _ in mixers], averaging=True)
    plain = MixerStack(mixers, list(stack.norms), [nn.Identity() for _ in mixers], averaging=False)
    x = torch.randn(3, 6)
    expected = x
    for mixer, norm in zip(mixers, stack.norms, strict=True):
        expected = expected + mixer(norm(expected))
    torch.testing.assert_close(stack(x), expected)
    torch.testing.assert_close(plain(x), expected)


def test_the_weights_of_the_average_are_used_and_learn() -> None:
    mixers = [nn.Identity(), nn.Identity()]
    stack = MixerStack(mixers, [nn.Identity(), nn.Identity()], [nn.Identity(), nn.Identity()], averaging=True)
    with torch.no_grad():
        stack.averages[-1].weight.copy_(torch.tensor([2.0, 3.0, 5.0]))
        stack.averages[-1].input_copy.fill_(1.0)
    x = torch.tensor([[1.0, 10.0]])
    y0, y1 = x, 2 * x  # each mixer returns the sum of what was before it
    torch.testing.assert_close(stack(x), 3 * x + 3 * y0 + 5 * y1)
    stack(x).sum().backward()
    assert all(p.grad is not None for p in stack.parameters())


def test_the_channel_mixer_leaves_windows_apart_and_mixes_channels_both_ways() -> None:
    torch.manual_seed(0)
    mixer = ImageChannelMixer(4, window=4)
    x = torch.randn(1, 8, 8, 4)
    moved = x.clone()
    moved[:, :4, :4] += 1
    changed = (mixer(moved) - mixer(x)).abs().amax(dim=(0, 3))
    assert (changed[:4, :4] > 0).all()
    assert (changed[4:] == 0).all()
    assert (changed[:, 4:] == 0).all()
    windows = torch.randn(1, 16, 8)
    poked = windows.clone()
    poked[:, :, 4] += 1
    scan = mixer.scans[0]
    reach = (scan(poked.mT) - scan(windows.mT)).abs().amax(dim=(0, 2))
    assert (reach > 0).all()


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 3), (4, 4)])
def test_windows_come_back_in_place(size: tuple[int, int]) -> None:
    mixer = ImageChannelMixer(2, window=4)
    x = torch.randn(2, *size, 6)
    assert torch.equal(mixer._merge(mixer._partition(x), *size), x)


def test_the_cross_scan_is_four_scans_of_the_grid() -> None:
    """Against the four directions written out: flatten by rows or columns, turn round, scan, undo, average."""
    torch.manual_seed(0)
    mixer = ImageTokenMixer(4)
    x = torch.randn(2, 3, 5, 4)
    u, gate = mixer.in_proj(x).chunk(2, -1)
    u = nn.functional.silu(mixer.conv[0](u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    total = torch.zeros_like(u)
    directions = ((False, False), (False, True), (True, False), (True, True))
    for s6, (columns, flip) in zip(mixer.ssm, directions, strict=True):
        grid = u.transpose(1, 2) if columns else u
        sequence = grid.flatten(1, 2)
        sequence = sequence.flip(1) if flip else sequence
        y = s6.scan(sequence)
        y = (y.flip(1) if flip else y).reshape(grid.shape)
        total = total + (y.transpose(1, 2) if columns else y) / 4
    expected = mixer.out_proj(mixer.norm(total) * nn.functional.silu(gate))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


def test_bad_input_names_the_cure() -> None:
    with pytest.raises(ValueError, match=r"at least 2×2"):
        create_model("vim2_nano")(torch.randn(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        create_model("vim2_nano")(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match="512"):
        create_model("tsm2")(torch.randn(1, 96, 7))
    with pytest.raises(UserError, match="did you mean 'vim2_small'"):
        create_model("vim2_smal")
    with pytest.raises(UserError, match="num_classes"):
        create_model("vim2_nano", num_clases=3)
    with pytest.raises(UserError, match=r"must be at least model\.patch_size"):
        create_model("tsm2", lookback=4)


def test_models_are_listed_by_pattern() -> None:
    assert "tsm2" in list_models()
    assert all(name.startswith("vim2") for name in list_models("vim2*"))
