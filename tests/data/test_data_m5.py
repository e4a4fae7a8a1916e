"""M5: its three files into a panel that configs/tsm2_m5.yaml trains on, and the benchmark's tiny mode."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from mmtrain.cli.data import app
from mmtrain.config import load_config
from mmtrain.data.prepare.m5 import prepare_m5
from mmtrain.data.series.panel import open_panel
from mmtrain.errors import UserError
from mmtrain.tasks import build_task
from tests.conftest import ROOT

DAYS = 250


@pytest.fixture
def m5(tmp_path: Path) -> Path:
    """Twenty products in the form of M5's files; every fourth goes on sale after two weeks."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from data_parts.made import write_m5
    finally:
        sys.path.pop(0)
    return write_m5(tmp_path / "raw", 20, DAYS)


def test_the_three_files_become_a_panel(m5: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["prepare", "m5", "--root", str(m5), "--out", str(tmp_path / "m5")])
    assert done.exit_code == 0, done.output
    assert "20 series of 236 to 250 rows, 4930 in all, 1 shard(s); 560 rows known in advance; written" in done.output
    panel = open_panel(tmp_path / "m5")
    sales = pd.read_parquet(m5 / "sales.parquet")
    prices = pd.read_parquet(m5 / "prices_cents_wide.parquet")
    calendar = pd.read_csv(m5 / "calendar.csv")
    assert panel.ids.tolist() == sales["id"].tolist()
    for number in (0, 5, 8):
        begin = 14 if number % 4 == 0 else 0
        row = sales.iloc[number]
        assert int(panel.first[number]) == begin
        assert panel.series(number)[:, 0].tolist() == row[[f"d_{day + 1}" for day in range(begin, DAYS)]].tolist()
        offset, rows = int(panel.offsets[number]), int(panel.rows[number])
        assert rows == DAYS + 28 - begin
        weeks = [f"w{week}" for week in calendar["wm_yr_wk"][begin:]]
        price = panel.known[0][offset : offset + rows, 0]
        assert price == pytest.approx(prices.iloc[number][weeks].to_numpy(dtype=float) / 100)
        snap = panel.shared[panel.groups[number], begin:, 0]
        assert snap.tolist() == calendar[f"snap_{row['state_id']}"][begin:].tolist()
    assert panel.shared_columns[-1] == "event_sporting"
    assert panel.shared[1, :, -1].tolist() == (calendar["event_type_1"] == "Sporting").astype(float).tolist()
    stamps = panel.stamps(0, 0, 1)
    assert stamps is not None
    assert str(stamps[0])[:10] == "2011-02-12"


def test_the_configuration_fits_what_is_prepared(m5: Path, tmp_path: Path) -> None:
    prepare_m5(m5, tmp_path / "m5")
    task = build_task(load_config("tsm2_m5", [f"data.root={tmp_path}"]))
    batch = task.train.fetch(np.arange(3), None)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "past": (3, 112, 1),
        "future": (3, 28, 1),
        "known": (3, 140, 1, 10),
        "static": (3, 1, 23),
    }
    assert (len(task.val), len(task.test or [])) == (20, 20)
    assert (batch["static"].sum(-1) == 4).all()


def test_missing_parts_are_named(m5: Path, tmp_path: Path) -> None:
    calendar = pd.read_csv(m5 / "calendar.csv")
    calendar.drop(columns=["snap_TX"]).to_csv(m5 / "calendar.csv", index=False)
    with pytest.raises(UserError, match=r"calendar\.csv: columns snap_TX are missing"):
        prepare_m5(m5, tmp_path / "out")
    calendar.drop(index=9).to_csv(m5 / "calendar.csv", index=False)
    with pytest.raises(UserError, match="the dates are not consecutive days"):
        prepare_m5(m5, tmp_path / "out")
    calendar.to_csv(m5 / "calendar.csv", index=False)
    prices = pd.read_parquet(m5 / "prices_cents_wide.parquet")
    prices.iloc[:-1].to_parquet(m5 / "prices_cents_wide.parquet")
    with pytest.raises(UserError, match=r"sales\.parquet has 20 rows, but prices_cents_wide\.parquet has 19"):
        prepare_m5(m5, tmp_path / "out")
    (m5 / "prices_cents_wide.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(UserError, match=r"prices_cents_wide\.parquet: cannot be read as a table"):
        prepare_m5(m5, tmp_path / "out")
    (m5 / "prices_cents_wide.parquet").unlink()
    with pytest.raises(UserError, match=r"prices_cents_wide\.parquet missing"):
        prepare_m5(m5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_m5(tmp_path: Path) -> None:
    root = ROOT.parent / "shared" / "data" / "m5"
    if not root.is_dir():
        pytest.skip(f"M5 is not here: put sales.parquet, prices_cents_wide.parquet and calendar.csv in {root}")
    counts = prepare_m5(root, tmp_path / "m5").meta["counts"]
    assert (counts["series"], counts["longest"], counts["ahead"], counts["holes"]) == (30490, 1941, 30490 * 28, 0)
    sales = pd.read_parquet(root / "sales.parquet")
    panel = open_panel(tmp_path / "m5")
    assert float(panel.series(12345)[-28:].sum()) == sales.iloc[12345, -28:].sum()
    task = build_task(load_config("tsm2_m5", [f"data.root={tmp_path}"]))
    assert len(task.val) > 30000
