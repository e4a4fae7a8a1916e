"""One damaged line of metrics, journal, result or configuration hides neither the other lines nor the other runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmtrain.cli.app import app
from mmtrain.plotting.runs import draw_curves
from mmtrain.report import write_report
from mmtrain.runs import journal
from mmtrain.runs.folder import RunFolder
from mmtrain.runs.journal import read_lines
from mmtrain.runs.reader import read_run
from mmtrain.runs.status import run_statuses
from mmtrain.train.trackers.sinks import JsonLines
from tests.cluster.made import HERE, make_run

DEEP = "[" * 100_000
#: Lines of metrics.jsonl that cannot be used.
DAMAGED = [
    '{"kind": "train", "step": Infinity, "loss": 1.0, "time": 1e9}',
    '{"kind": "train", "step": 1e999, "loss": 1.0, "time": 1e9}',
    '{"kind": "train", "step": NaN, "loss": 1.0, "time": 1e9}',
    '{"kind": "train", "step": -1, "loss": 1.0, "time": 1e9}',
    '{"kind": "train", "step": "7", "loss": 1.0, "time": 1e9}',
    '{"kind": "train", "step": null, "loss": 1.0, "time": 1e9}',
    '{"kind": "train", "step": true, "loss": 1.0, "time": 1e9}',
    '{"kind": "train", "step": [7], "loss": 1.0, "time": 1e9}',
    f'{{"kind": "train", "step": 1{"0" * 400}, "loss": 1.0, "time": 1e9}}',
    f'{{"kind": "train", "step": 1{"0" * 5000}, "loss": 1.0, "time": 1e9}}',
    f'{{"kind": "train", "step": 7, "loss": 1.0, "time": 1e9, "other": 1{"0" * 400}}}',
    '{"kind": "train", "step": 7, "loss": "low", "time": 1e9}',
    '{"kind": "train", "step": 7, "loss": {}, "time": 1e9}',
    '{"kind": "train", "step": 7, "loss": 1.0, "time": "now"}',
    '{"kind": "train", "step": 7, "loss": 1.0, "time": 1e300}',
    '{"kind": "train", "step": 7, "samples": Infinity, "epoch": 0.1, "time": 1e9}',
    '{"kind": "train", "step": 7, "samples": 70, "epoch": "x", "time": 1e9}',
    '{"kind": "train", "step": 7, "step_seconds": "x", "time": 1e9}',
    '{"kind": "eval", "split": "val", "step": 7, "top1": "x", "time": 1e9}',
    '{"kind": 5, "step": 7}',
    '{"step": 7}',
    "7",
    "{",
    "\x00\x00",
    DEEP,
]


def _insert(run: Path, line: str) -> None:
    """Put ``line`` as the third line of the metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_left_out_and_counted(line: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    whole = read_lines(run / "metrics.jsonl").lines
    (before,) = run_statuses([run])
    _insert(run, line)
    found = read_lines(run / "metrics.jsonl")
    assert found.lines == whole
    assert (found.damaged, found.first) == (1, 3)
    (after,) = run_statuses([run])
    assert (after.step, after.total, after.loss, after.best, after.damaged) == (
        *(before.step, before.total, before.loss, before.best),
        3,
    )
    assert read_run(run, recent=None).metrics == whole
    JsonLines(RunFolder(run)).drop_after(1000)  # as a resume does
    assert [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()] == whole


def test_the_other_runs_stay_listed_and_the_file_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "good")
    bad = make_run(tmp_path / "bad")
    for line in DAMAGED[:5]:
        _insert(bad, line)
    shown = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert shown.exit_code == 0
    assert "good" in shown.output
    assert f"damaged lines were ignored: {bad / 'metrics.jsonl'} (line 3)" in shown.output
    page = write_report([bad], tmp_path / "report.html").read_text()
    assert f"damaged lines of {bad / 'metrics.jsonl'} were ignored; the first is line 3" in page
    draw_curves(tmp_path / "curves.png", read_lines(bad / "metrics.jsonl").lines, ["top1"])


def test_a_line_that_is_being_written_is_no_damage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert read_run(run).damaged is None
    assert read_lines(run / "metrics.jsonl").damaged == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (journal.NAME, '{"kind": "started", "job": null, "time": "now", "pid": 1, "host": "x"}\n'),
        (journal.NAME, f'{{"kind": "started", "pid": {10**30}, "host": "{HERE}", "time": 1e9}}\n'),
        (journal.NAME, f'{{"kind": "started", "pid": {2**40}, "host": "{HERE}", "time": 1e9}}\n'),
        (journal.NAME, f'{{"kind": "started", "pid": -5, "host": "{HERE}", "time": 1e9}}\n'),
        (journal.NAME, '{"time": 5}\n'),
        (journal.NAME, DEEP),
        ("result.json", '{"test": [1]}'),
        ("result.json", "[1]"),
        ("result.json", DEEP),
        (
            "config.yaml",
            "train: {epochs: x, batch_size: [1], max_steps: .inf}\nparallel: {start_timeout: x}",
        ),
        ("config.yaml", "train: 5\nmodel: 7\n"),
        ("config.yaml", "["),
        ("config.yaml", "\x00"),
    ],
)
def test_a_damaged_file_of_one_run_does_not_hide_the_others(name: str, text: str, tmp_path: Path) -> None:
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    (bad / name).write_text(text)
    assert [status.path for status in run_statuses([good, bad])] == [good, bad]
