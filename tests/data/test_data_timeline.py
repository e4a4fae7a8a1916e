"""Steps and places of times, and what a date says."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.data.series.panel_inputs import FEATURES, calendar_features, calendar_names
from mmtrain.data.series.timeline import (
    Step,
    Steps,
    Timeline,
    continued,
    step_of,
    timeline_of,
)
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
    positions, on = line.positions(stamps(freq))
    assert on.all()
    assert positions.tolist() == list(range(40))
    if freq not in ("ME", "QS", "YS"):
        assert (line.stamps(3, 5) == stamps(freq)[3:8]).all()


def test_a_bad_step_is_named() -> None:
    for text in ("", "0D", "5 fortnights", "-1h"):
        with pytest.raises(UserError, match="--step "):
            Step.parse(text)
    assert step_of(stamps("D", 1)) is None


def test_gaps_do_not_change_the_step_and_odd_times_are_off_the_grid() -> None:
    times = np.delete(stamps("h"), [3, 4, 9])
    assert step_of(times) == Step.parse("h")
    positions, on = Timeline(times[0], Step.parse("h")).positions(times[:1] + np.array([0, 90, 120]).astype("m8[m]"))
    assert on.tolist() == [True, False, True]
    assert positions[[0, 2]].tolist() == [0, 2]


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


#: Times of a table, as pandas makes them or one by one, and those that follow.
NEXT: list[tuple[str, list[str], list[str]]] = [
    ("month start", ["MS", "2010-01-01", "120"], ["2020-01-01", "2020-02-01", "2020-03-01"]),
    ("month end", ["ME", "2010-01-31", "120"], ["2020-01-31", "2020-02-29", "2020-03-31"]),
    ("month end, 18:00", ["ME", "2010-01-31T18", "120"], ["2020-01-31T18", "2020-02-29T18", "2020-03-31T18"]),
    ("last business day", ["BME", "2010-01-29", "120"], ["2020-01-31", "2020-02-28", "2020-03-31"]),
    ("first business day", ["BMS", "2010-01-01", "120"], ["2020-01-01", "2020-02-03", "2020-03-02"]),
    ("quarter start", ["QS", "1995-01-01", "100"], ["2020-01-01", "2020-04-01", "2020-07-01"]),
    ("quarter end", ["QE-NOV", "1995-02-28", "100"], ["2020-02-29", "2020-05-31", "2020-08-31"]),
    ("year", ["YS", "1910-01-01", "110"], ["2020-01-01", "2021-01-01", "2022-01-01"]),
    ("year end in June", ["YE-JUN", "1990-06-30", "30"], ["2020-06-30", "2021-06-30", "2022-06-30"]),
    ("business days", ["B", "2021-01-01", "200"], ["2021-10-08", "2021-10-11", "2021-10-12"]),
    ("weeks", ["W-FRI", "2024-01-05", "20"], ["2024-05-24", "2024-05-31", "2024-06-07"]),
    ("third Friday", ["WOM-3FRI", "2024-01-19", "20"], ["2025-09-19", "2025-10-17", "2025-11-21"]),
    ("days", ["D", "2024-02-25", "4"], ["2024-02-29", "2024-03-01", "2024-03-02"]),
    ("quarters of an hour", ["15min", "2024-01-01", "9"], ["2024-01-01T02:15", "2024-01-01T02:30", "2024-01-01T02:45"]),
    ("trading hours", ["bh", "2024-01-04T09", "20"], ["2024-01-08T13", "2024-01-08T14", "2024-01-08T15"]),
    ("the 15th of a month", ["15"], ["2025-01-15", "2025-02-15", "2025-03-15"]),
    ("the 30th or the last day", ["30"], ["2025-01-30", "2025-02-28", "2025-03-30"]),
    ("two times alone", ["2024-01-01T06", "2024-01-01T09"], ["2024-01-01T12", "2024-01-01T15", "2024-01-01T18"]),
]


def made(words: list[str]) -> np.ndarray:
    """The times of a line of NEXT: frequency, start and number; a day of the month; or the times themselves."""
    if len(words) == 3:
        return pd.date_range(words[1], periods=int(words[2]), freq=words[0]).to_numpy()
    if len(words) == 2:
        return np.array(words, dtype="datetime64[us]")
    months = np.arange("2023-01", "2025-01", dtype="datetime64[M]")
    ends = (months + 1).astype("datetime64[D]") - 1
    return np.minimum(months.astype("datetime64[D]") + (int(words[0]) - 1), ends).astype("datetime64[us]")


@pytest.mark.parametrize(("words", "expected"), [case[1:] for case in NEXT], ids=[case[0] for case in NEXT])
def test_the_times_that_follow_a_table(words: list[str], expected: list[str]) -> None:
    times = made(words)
    found = continued(times, len(times) + 3)
    assert found is not None
    assert (found[:-3] == times).all()
    assert found[-3:].tolist() == np.array(expected, dtype=found.dtype).tolist()
    assert continued(times, 1) is times


@pytest.mark.parametrize(
    ("freq", "start", "periods", "gone", "expected"),
    [
        ("B", "2023-01-02", 120, [40, 99, 110], ["2023-06-19", "2023-06-20"]),
        ("ME", "2010-01-31", 60, [7, 30, 58], ["2015-01-31", "2015-02-28"]),
        ("MS", "2010-01-01", 60, [7, 58], ["2015-01-01", "2015-02-01"]),
        ("BME", "2010-01-29", 60, [7, 58], ["2015-01-30", "2015-02-27"]),
        ("h", "2010-01-01", 60, [7, 30, 58], ["2010-01-03T12", "2010-01-03T13"]),
        ("D", "2024-01-01", 60, [7, 30, 58], ["2024-03-01", "2024-03-02"]),
    ],
)
def test_holidays_and_gaps_do_not_hide_the_frequency(
    freq: str, start: str, periods: int, gone: list[int], expected: list[str]
) -> None:
    times = np.delete(pd.date_range(start, periods=periods, freq=freq).to_numpy(), gone)
    found = continued(times, len(times) + 2)
    assert found is not None
    assert found[-2:].tolist() == np.array(expected, dtype=found.dtype).tolist()


@pytest.mark.parametrize(
    ("freq", "start", "periods", "expected"),
    [
        ("h", "2023-10-20", 24 * 9 + 2, ["2023-10-29 02:00:00+02:00", "2023-10-29 02:00:00+01:00"]),
        ("D", "2023-10-20", 9, ["2023-10-29 00:00:00+02:00", "2023-10-30 00:00:00+01:00"]),
        ("D", "2023-10-20", 12, ["2023-11-01 00:00:00+01:00", "2023-11-02 00:00:00+01:00"]),
        ("B", "2024-03-11", 15, ["2024-04-01 00:00:00+02:00", "2024-04-02 00:00:00+02:00"]),
        ("MS", "2022-11-01", 12, ["2023-11-01 00:00:00+01:00", "2023-12-01 00:00:00+01:00"]),
        ("ME", "2022-11-30", 11, ["2023-10-31 00:00:00+01:00", "2023-11-30 00:00:00+01:00"]),
        ("D", "2024-03-20 02:30", 11, ["2024-03-31 03:00:00+02:00", "2024-04-01 02:30:00+02:00"]),
    ],
)
def test_days_are_those_of_the_time_zone(freq: str, start: str, periods: int, expected: list[str]) -> None:
    zone = "Europe/Berlin"
    times = pd.date_range(start, periods=periods, freq=freq, tz=zone)
    found = continued(times.tz_convert("UTC").tz_localize(None).to_numpy(), periods + 2, zone)
    local = pd.DatetimeIndex(found).tz_localize("UTC").tz_convert(zone)
    assert [str(stamp) for stamp in local[-2:]] == expected


def test_times_without_a_step_do_not_go_on() -> None:
    assert continued(stamps("D", 1), 3) is None
    assert continued(np.repeat(stamps("D", 1), 4), 5) is None


@pytest.mark.parametrize("freq", ["MS", "ME", "BME", "BMS", "QE", "YE-JUN", "B", "W-FRI", "D", "h"])
def test_a_grid_keeps_the_days_of_its_times(freq: str) -> None:
    times = stamps(freq, 60, "2019-11-29 06:00")
    line = timeline_of(times)
    assert line is not None
    assert line == Timeline.from_json(json.loads(json.dumps(line.to_json())))
    positions, on = line.positions(times)
    assert on.all()
    assert positions.tolist() == list(range(60))
    assert (line.stamps(0, 60) == times).all()
    assert not line.positions(times[3:4] + np.timedelta64(1, "h"))[1].any() or line.step.months or freq == "h"


def test_a_grid_of_business_days_has_no_weekends() -> None:
    line = Timeline(np.datetime64("2024-01-03", "us"), Step.parse("B"))
    assert str(line.step) == "1B"
    week = np.arange("2024-01-05", "2024-01-09", dtype="datetime64[D]")
    positions, on = line.positions(week)
    assert on.tolist() == [True, False, False, True]
    assert positions.tolist() == [2, 3, 3, 3]
    assert calendar_names(line.step) == calendar_names(Step.parse("D"))
    assert step_of(stamps("B", 40)) == line.step
    assert step_of(stamps("B", 3, "2024-01-01")) == Step.parse("D")  # less than a week says nothing of weekends


@pytest.mark.parametrize("anchor", ["1", "31", "ME", None])
def test_a_grid_of_months_is_read_as_it_was_written(anchor: str | None) -> None:
    line = Timeline(np.datetime64("2020-01-31", "us"), Step(1, months=True), anchor)
    assert Timeline.from_json(line.to_json()) == line


@pytest.mark.parametrize("damage", [{"anchor": "0"}, {"anchor": "32"}, {"anchor": "XX"}, {"count": 0}])
def test_a_damaged_grid_is_refused(damage: dict[str, object]) -> None:
    saved = Timeline(np.datetime64("2020-01-31", "us"), Step(1, months=True), "31").to_json()
    with pytest.raises(ValueError, match=r"invalid"):
        Timeline.from_json({**saved, **damage})
