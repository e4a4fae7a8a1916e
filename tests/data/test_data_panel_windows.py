"""Windows of panels, against plain slicing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.data.core.source import Source
from mmtrain.data.series.panel import open_panel
from mmtrain.data.series.panel_inputs import calendar_features
from mmtrain.data.series.panel_source import PanelData
from mmtrain.data.series.split import SplitRule
from mmtrain.errors import UserError
from tests.data.panels import in_shards, opened, prepared

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(lambda found: [*found, 24])
KEYS: dict[str, Any] = {"known": ["price"], "static": ["kind", "size"], "calendar": True}


def panel(folder: Path, lengths: list[int], shard_rows: int = 1 << 20, **keys: Any) -> PanelData:
    return in_shards(folder, lengths, shard_rows, **{**KEYS, **keys})


@settings(max_examples=25, deadline=None)
@given(lengths, st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 60))
@pytest.mark.slow
def test_windows_are_plain_slices(
    lengths: list[int], lookback: int, horizon: int, stride: int, shard_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        # 24 rows are enough for every look-back and horizon drawn, so that there are windows in every split
        data = panel(Path(name), lengths, shard_rows, lookback=lookback, horizon=horizon, stride=stride)
        raw = data.panel
        begins = {"train": [0] * len(lengths), "val": [max(n - 8, 0) for n in lengths]}
        ends = {"train": [max(n - 8, 0) for n in lengths], "val": [max(n - 4, 0) for n in lengths]}
        begins["test"], ends["test"] = ends["val"], lengths
        for split, source in (("train", data.train), ("val", data.val), ("test", data.test)):
            step = stride if split == "train" else 1
            expected = [
                (number, target)
                for number in range(len(lengths))
                for target in range(max(begins[split][number], lookback), ends[split][number] - horizon + 1, step)
            ]
            assert isinstance(source, Source)
            assert (len(source), sum(source.block_sizes)) == (len(expected), len(expected))
            order = np.random.default_rng(1).permutation(len(expected))
            batch = source.fetch(order, None)
            assert batch["known"].shape == (len(order), lookback + horizon, 1, 5)
            assert batch["static"].shape == (len(order), 1, 3)
            for place, index in enumerate(order.tolist()):
                number, target = expected[index]
                assert raw.ids[number] == f"s{number}"
                origin = data.origin(source, index)
                both = np.concatenate([batch["past"][place].numpy(), batch["future"][place].numpy()])
                rows = np.arange(target - lookback, target + horizon)
                assert origin.scaler.inverse(both)[:, 0] == pytest.approx(1000.0 * number + rows, abs=2e-3)
                price = batch["known"][place, :, 0, 4].numpy() * data.inputs.std[0] + data.inputs.mean[0]
                assert price == pytest.approx(rows + number, abs=1e-3)
                stamps = origin.stamps
                assert stamps is not None
                weekday = (stamps.astype("datetime64[D]").astype(int) + 3) % 7
                assert batch["known"][place, :, 0, 0].numpy() == pytest.approx(weekday / 6 - 0.5, abs=1e-6)
                assert batch["static"][place, 0, :2].tolist() == [1.0 - number % 2, float(number % 2)]


def test_the_scaler_is_of_the_series_own_training_rows(tmp_path: Path) -> None:
    data = panel(tmp_path, [30, 12, 9], 10)
    for number, length in enumerate([30, 12, 9]):
        rows = 1000.0 * number + np.arange(length - 8)
        deviation = rows.std() if length > 9 else 1.0
        assert data.inputs.scalers.mean[number, 0] == pytest.approx(rows.mean(), rel=1e-6)
        assert data.inputs.scalers.std[number, 0] == pytest.approx(deviation, rel=1e-5)
    prices = np.concatenate([np.arange(length - 8) + number for number, length in enumerate([30, 12, 9])])
    assert data.inputs.mean[0] == pytest.approx(prices.mean())
    assert data.inputs.std[0] == pytest.approx(prices.std())


def test_series_too_short_are_left_out_and_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = panel(tmp_path, [30, 9, 17, 16])
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'panel'}: of 4 series, those too short for one window of lookback 6 + horizon 3 are left out: "
        "2 from train, 1 from val"
    ]
    assert data.train.spans.counts.tolist() == [22 - 8, 0, 1, 0]
    with pytest.raises(
        UserError, match=r"train split \(data.split=last .*lookback 60 \+ horizon 3; the longest series has 30"
    ):
        opened(tmp_path / "panel", lookback=60)


def test_what_is_known_can_be_the_horizon_alone(tmp_path: Path) -> None:
    prepared(tmp_path, [30])
    whole = opened(tmp_path / "panel", known=["price"]).train.fetch(np.arange(5), None)["known"]
    short = opened(tmp_path / "panel", known=["price"], steps=3).train.fetch(np.arange(5), None)["known"]
    assert short.shape == (5, 3, 1, 1)
    assert (short == whole[:, -3:]).all()
    with pytest.raises(UserError, match=r"model\.future_length=10: .* = 9 time steps"):
        opened(tmp_path / "panel", steps=10)


def test_holes_become_masks(tmp_path: Path) -> None:
    from tests.data.panels import long_frame, write

    frame = long_frame([30, 24])
    frame.loc[[3, 4, 20], "y"] = np.nan
    from mmtrain.data.prepare.panel import prepare_panel

    rule = SplitRule("last", last=(4, 4))
    file = write(frame[["id", "date", "y"]], tmp_path / "t.csv")
    done = prepare_panel(file, tmp_path / "p", split=rule)
    assert done.meta["counts"]["holes"] == open_panel(tmp_path / "p").holes == 3
    with pytest.raises(UserError, match=r"3 values are missing; set data\.missing=mask, or prepare the panel again"):
        opened(tmp_path / "p")
    data = opened(tmp_path / "p", missing="mask")
    batch = data.train.fetch(np.arange(len(data.train)), None)
    assert batch["past"].isfinite().all()
    assert batch["future"].isfinite().all()
    for index in range(len(data.train)):
        number, target = (int(x[0]) for x in data.train.locate(np.array([index])))
        rows = np.arange(target - 6, target + 3)
        seen = ~np.isin(rows, [3, 4, 20]) if number == 0 else np.ones(9, bool)
        assert batch["mask"][index, :, 0].tolist() == seen[:6].tolist()
        assert batch["future_mask"][index, :, 0].tolist() == seen[6:].tolist()
    good = np.delete(np.arange(22.0), [3, 4, 20])
    assert data.inputs.scalers.mean[0, 0] == pytest.approx(good.mean())
    assert data.inputs.scalers.std[0, 0] == pytest.approx(good.std())
    filled = prepare_panel(file, tmp_path / "f", split=rule, missing="interpolate")
    assert filled.meta["counts"]["filled"] == 3
    assert open_panel(tmp_path / "f").series(0)[:, 0].tolist() == list(range(30))
    assert "mask" not in opened(tmp_path / "f").train.fetch(np.arange(2), None)


def test_other_splits_fit_the_scalers_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    prepared(tmp_path, [30, 40])
    with caplog.at_level(logging.INFO, "mmtrain"):
        opened(tmp_path / "panel")
        opened(tmp_path / "panel", split="last", last=[4, 4])
        assert not caplog.records
        data = opened(tmp_path / "panel", split="date", dates=["2024-01-15", "2024-01-22"])
    assert "for another split; fitted new ones for data.split=date" in caplog.text
    assert data.borders.tolist() == [[14, 21, 30], [13, 20, 40]]  # series 1 begins a day later
    assert data.inputs.scalers.mean[:, 0].tolist() == [6.5, 1006.0]
    parts = opened(tmp_path / "panel", split="ratio", ratios=[0.6, 0.2, 0.2], lookback=4)
    assert parts.borders.tolist() == [[18, 24, 30], [24, 32, 40]]
    with pytest.raises(UserError, match=r"train split \(data.split=date"):
        opened(tmp_path / "panel", split="date", dates=["2023-01-15", "2024-01-22"])


def test_what_the_calendar_says_goes_on_behind_the_data(tmp_path: Path) -> None:
    """Also where fewer steps are known than are forecast."""
    prepared(tmp_path, [30, 12])
    data = opened(tmp_path / "panel", calendar=True, horizon=3, steps=2)
    stop = data.panel.lengths + 3  # a forecast of 3 steps
    found = data.inputs.known(np.arange(2), stop - 2)
    for series in range(2):
        stamps = data.panel.stamps(series, int(stop[series]) - 2, int(stop[series]))
        assert found[series].tolist() == calendar_features(stamps, data.inputs.calendar_names).tolist()
