"""Auxiliary inputs, missing values, quantiles and the Student-t of TSM2."""

from __future__ import annotations

import pytest
import torch

from mmtrain.models import create_model

SMALL = {"lookback": 48, "horizon": 12, "dim": 8, "dropout": 0.0}


def test_auxiliary_inputs_are_used_by_any_number_of_variates() -> None:
    torch.manual_seed(0)
    model = create_model("tsm2", static_features=3, future_features=2, **SMALL)
    for m in (1, 5):
        past, static, known = torch.randn(2, 48, m), torch.randn(2, m, 3), torch.randn(2, 60, m, 2)
        out = model(past, static=static, known=known)
        assert out.shape == (2, 12, m)
        assert not torch.allclose(out, model(past, static=static + 1, known=known))
        later = known.clone()
        later[:, -1] += 1  # the last step of the horizon
        assert not torch.allclose(out, model(past, static=static, known=later))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.auxiliary.parameters())


def test_a_known_cause_is_learnt() -> None:
    """The future is what is known of it: without that input it cannot be told from the noise before."""
    torch.manual_seed(0)
    model = create_model("tsm2", future_features=1, future_length=12, **SMALL)
    past, known = torch.randn(32, 48, 2), torch.randn(32, 12, 2, 1)
    future = known.squeeze(-1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = (model(past, known=known) - future).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh_past, fresh = torch.randn(32, 48, 2), torch.randn(32, 12, 2, 1)
    error = (model(fresh_past, known=fresh) - fresh.squeeze(-1)).square().mean().item()
    assert error < 0.7  # the variance is 1, and no past of noise tells anything


def test_the_input_is_three_times_as_long_as_the_paper_says() -> None:
    plain = create_model("tsm2", **SMALL)
    both = create_model("tsm2", static_features=1, future_features=1, **SMALL)
    patches = [m.head.in_features // 8 for m in (plain, both)]
    assert patches == [(48 - 16) // 8 + 1, (3 * 48 - 16) // 8 + 1]


def test_what_is_masked_does_not_matter() -> None:
    torch.manual_seed(0)
    for options in ({}, {"mask_input": True}, {"window_norm": "mean", "linear_path": True}):
        model = create_model("tsm2", **SMALL, **options).eval()
        past = torch.randn(2, 48, 3) + 5
        mask = torch.rand(2, 48, 3) > 0.3
        spoilt = past.masked_fill(~mask, float("nan"))
        torch.testing.assert_close(model(spoilt, mask=mask), model(past, mask=mask))
        torch.testing.assert_close(model(past, mask=torch.ones_like(mask)), model(past), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(past, mask=mask), model(past))
        model(spoilt, mask=mask).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_variate_without_any_observation_is_no_catastrophe() -> None:
    model = create_model("tsm2", **SMALL).eval()
    mask = torch.ones(1, 48, 2, dtype=torch.bool)
    mask[..., 1] = False
    assert model(torch.full((1, 48, 2), 3.0), mask=mask).isfinite().all()


def test_quantiles_rise_and_learn_their_levels() -> None:
    torch.manual_seed(0)
    levels = [0.1, 0.5, 0.9]
    model = create_model("tsm2", output="quantiles", quantiles=levels, **SMALL)
    q = torch.tensor(levels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        past, future = torch.randn(64, 48, 1), torch.randn(64, 12, 1)
        made = model(past, full=True)
        assert (made.quantiles.diff(dim=-1) > 0).all()
        short = future.unsqueeze(-1) - made.quantiles
        loss = torch.maximum(q * short, (q - 1) * short).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    past, future = torch.randn(500, 48, 1), torch.randn(500, 12, 1)
    share = (future.unsqueeze(-1) <= model(past, full=True).quantiles).double().mean(dim=(0, 1, 2))
    # 6,000 draws, and a model that has seen 12,800 windows of noise
    torch.testing.assert_close(share, q.double(), rtol=0, atol=0.06)


@pytest.mark.parametrize(("levels", "middle"), [([0.1, 0.5, 0.9], 1), ([0.5, 0.9], 0), ([0.02, 0.1, 0.4, 0.9], 2)])
def test_the_quantile_nearest_the_median_is_the_point(levels: list[float], middle: int) -> None:
    made = create_model("tsm2", output="quantiles", quantiles=levels, **SMALL)(torch.randn(2, 48, 3), full=True)
    torch.testing.assert_close(made.quantiles[..., middle], made.point)


def test_the_observed_part_of_a_window_has_mean_0_and_deviation_1() -> None:
    model = create_model("tsm2", **SMALL)
    past, seen = 5 + 3 * torch.randn(4, 2, 48), torch.rand(4, 2, 48) > 0.6
    x, mean, std = model._window_norm(past, seen)
    for row in range(4):
        for variate in range(2):
            there = seen[row, variate]
            assert x[row, variate, there].mean().item() == pytest.approx(0, abs=1e-5)
            assert x[row, variate, there].std(correction=0).item() == pytest.approx(1, abs=1e-4)
            assert (x[row, variate, ~there] == 0).all()
    torch.testing.assert_close((x * std + mean)[seen], past[seen])


def test_the_student_t_is_a_distribution_around_the_point() -> None:
    torch.manual_seed(0)
    model = create_model("tsm2", output="student_t", **SMALL)
    past = torch.randn(3, 48, 2)
    made = model(past, full=True)
    torch.testing.assert_close(made.distribution.loc, made.point)
    assert (made.distribution.df > 2).all()
    moved = model(10 * past + 3, full=True).distribution
    torch.testing.assert_close(moved.scale, 10 * made.distribution.scale, rtol=1e-2, atol=1e-3)
    made.distribution.log_prob(torch.randn(3, 12, 2)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"static": (2, 3, 4)}, "static has shape"),
        ({}, "static is missing"),
        ({"static": (2, 3, 2), "known": (2, 60, 3, 1)}, "known was given"),
        ({"mask": (2, 48, 4)}, "mask has shape"),
    ],
)
def test_wrong_inputs_are_named(inputs: dict[str, tuple[int, ...]], words: str) -> None:
    model = create_model("tsm2", static_features=2, **SMALL)
    with pytest.raises(ValueError, match=words):
        model(torch.randn(2, 48, 3), **{name: torch.zeros(shape) for name, shape in inputs.items()})
    with pytest.raises(ValueError, match="this model has no such input"):
        create_model("tsm2", **SMALL)(torch.randn(2, 48, 3), static=torch.zeros(2, 3, 1))
