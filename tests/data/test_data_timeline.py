"""Steps and places of times, and what a date says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.data.series.timeline import FEATURES, Step, Steps, Timeline, calendar_features, calendar_names, step_of
from mmtrain.errors import UserError


def stamps(freq: str, periods: int = 40, start: str = "2023-11-01") -> np.ndarray:
    return pd.date_range(start, periods=periods, freq=freq).to_numpy()


@pytest.mark.parametrize(
    ("freq", "text"),
    [
        ("15min", "15min"),
        ("h", "1h"),
        ("D", "1D"),
        ("7D", "1W"),
        ("MS", "1M"),
        ("ME", "1M"),
        ("QS", "3M"),
        ("YS", "12M"),
    ],
)
def test_steps_are_found_and_spoken(freq: str, text: str) -> None:
    found = step_of(stamps(freq))
    assert str(found) == text
    assert found == Step.parse({"12M": "Y", "3M": "Q"}.get(text, text))
    line = Timeline(stamps(freq)[0], found)
    places, on = line.places(stamps(freq))
    assert on.all()
    assert places.tolist() == list(range(40))
    if freq not in ("ME", "QS", "YS"):
        assert (line.stamps(3, 5) == stamps(freq)[3:8]).all()


def test_a_bad_step_is_named() -> None:
    for text in ("", "0D", "5 fortnights", "-1h"):
        with pytest.raises(UserError, match="step "):
            Step.parse(text)
    assert step_of(stamps("D", 1)) is None


def test_gaps_do_not_change_the_step_and_odd_times_are_off_the_grid() -> None:
    times = np.delete(stamps("h"), [3, 4, 9])
    assert step_of(times) == Step.parse("h")
    places, on = Timeline(times[0], Step.parse("h")).places(times[:1] + np.array([0, 90, 120]).astype("m8[m]"))
    assert on.tolist() == [True, False, True]
    assert places[[0, 2]].tolist() == [0, 2]


@given(st.sampled_from(["h", "D", "MS"]), st.randoms(use_true_random=False))
def test_the_step_of_rows_in_any_order(freq: str, random: object) -> None:
    times = stamps(freq).astype("datetime64[us]").astype(np.int64)
    random.shuffle(times)  # type: ignore[attr-defined]
    steps = Steps()
    steps.add(np.diff(times))
    steps.see(times[:7])
    steps.see(times[7:])
    assert steps.usual() == Step.parse({"h": "h", "D": "D", "MS": "M"}[freq])


def test_only_what_varies_at_the_step() -> None:
    assert calendar_names(Step.parse("15min")) == ["minute", "hour", "weekday", "day", "yearday", "month"]
    assert calendar_names(Step.parse("h")) == ["hour", "weekday", "day", "yearday", "month"]
    assert calendar_names(Step.parse("D")) == ["weekday", "day", "yearday", "month"]
    assert calendar_names(Step.parse("W")) == ["day", "yearday", "month"]
    assert calendar_names(Step.parse("M")) == ["month"]
    assert calendar_names(Step.parse("Y")) == []
    for freq in ("15min", "h", "D", "7D", "MS"):
        times = stamps(freq, 20000 if freq == "15min" else 2000)
        made = calendar_features(times, list(FEATURES))
        names = calendar_names(step_of(times) or Step(1))
        varies = {name for name, column in zip(FEATURES, made.T, strict=True) if np.ptp(column) > 0}
        # of a month's first day, the rest follows from the month and the year
        assert set(names) == varies - ({"weekday", "yearday"} if freq == "MS" else set())


def test_features_are_those_of_pandas() -> None:
    index = pd.date_range("2023-12-28", periods=30000, freq="37min7s")
    made = calendar_features(index.to_numpy(), list(FEATURES))
    expected = np.stack(
        [
            index.second / 59,
            index.minute / 59,
            index.hour / 23,
            index.day_of_week / 6,
            (index.day - 1) / 30,
            (index.day_of_year - 1) / 365,
            (index.month - 1) / 11,
        ],
        axis=1,
    )
    assert made.dtype == np.float32
    assert np.abs(made - (expected - 0.5)).max() < 1e-6
    assert made.min() >= -0.5
    assert made.max() <= 0.5
