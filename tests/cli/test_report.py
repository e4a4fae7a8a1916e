"""``mmtrain report``: one file that stands by itself, in which no text of a run is taken for HTML."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtrain.plotting.runs import draw_confusion
from mmtrain.report.charts import thinned
from mmtrain.report.collect import differences, distinct_names, flattened
from tests.cluster.made import BEGIN, HERE, make_run, noted, write
from tests.conftest import Cli

EVIL = "<script>alert(1)</script>$x^{&"


class _Reader(HTMLParser):
    """Collects elements, attributes and text, and sees that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def parsed(file: Path) -> _Reader:
    reader = _Reader()
    reader.feed(file.read_text())
    reader.close()
    assert reader.open == []
    return reader


def rich_run(path: Path, *overrides: str) -> Path:
    """A run with restarts, a rollback, pictures, jobs and faults."""
    run = make_run(path, 15, *overrides)
    write(run, "resume", BEGIN + 15, step=8)
    write(run, "rollback", BEGIN + 40, step=16, from_step=20, loss=9.0)
    write(run, "start", BEGIN, step=8, ready_seconds=1.5, first_step_seconds=2.5)
    noted(run, "submitted", BEGIN - 5, job="7", nodes="2-4", tasks=8)
    noted(run, "started", BEGIN, job="7", restart=0, hosts=["n1", "n2"], world=16)
    noted(run, "ended", BEGIN + 90, job="7", restart=0, reason="preempted", requeued=True, step=8)
    counts = np.array([[9, 1, 0], [2, 7, 1], [0, 0, 10]])
    draw_confusion(run / "confusion.png", ["cat", "d$g", "a name that is much too long"], counts, "30 samples")
    (run / "data_faults.jsonl").write_text('{"shard": "a.tar", "sample": "<b>9</b>"}\n')
    (run / "failure.txt").write_text("rank 3 on n2 failed: no space <left>\n")
    return run


def test_one_run_beside_itself(cli: Cli, tmp_path: Path) -> None:
    run = rich_run(tmp_path / "digits")
    (run / "result.json").write_text(json.dumps({"step": 30, "test": {"top1": 97.25}}))
    done = cli("report", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "report.html")
    page = parsed(run / "report.html")
    for text in ("digits", "finished", "30/30", "top1 97.25", "train loss", "val top1", "learning rate", "samples/s"):
        assert text in page.text
    for text in ("gradient norm", "averaging γ", "n1, n2", "preempted", "<b>9</b>", "name: vim2_digits"):
        assert text in page.text
    assert "resumed from this step" in page.text
    assert "after a loss spike" in page.text
    assert "no space <left>" in page.text
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 10
    assert tags.count("img") == 1
    assert (run / "report.html").stat().st_size < 1_000_000


def test_it_needs_nothing_from_outside_and_runs_nothing(cli: Cli, tmp_path: Path) -> None:
    cli("report", rich_run(tmp_path / "one"), rich_run(tmp_path / "two"), "--out", tmp_path / "out" / "both.html")
    file = tmp_path / "out" / "both.html"
    page = parsed(file)
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.seen)
    for _, attributes in page.seen:
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
        assert not any(name.startswith("on") for name in attributes)
    assert "http:" not in file.read_text()
    assert "https:" not in file.read_text()
    names = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(names) == len(set(names))
    wanted = [str(a[name])[1:] for _, a in page.seen for name in ("href", "xlink:href") if name in a]
    wanted += re.findall(r"url\(#([^)]+)\)", file.read_text())
    assert wanted
    assert set(wanted) <= set(names)


def test_texts_are_escaped(cli: Cli, tmp_path: Path) -> None:
    run = rich_run(tmp_path / "<script>")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("name: vim2_nano", f"name: '{EVIL}'"))
    noted(run, "ended", job=EVIL, restart=0, reason=EVIL, requeued=False, step=1)
    other = rich_run(tmp_path / 'b"><script>')
    assert cli("report", run, other, "--out", "both.html").returncode == 0
    page = parsed(tmp_path / "both.html")
    assert "script" not in [tag for tag, _ in page.seen]
    assert "<script" not in (tmp_path / "both.html").read_text()
    assert EVIL in page.text
    assert "<script>" in page.text


def test_several_runs_side_by_side(cli: Cli, tmp_path: Path) -> None:
    first = rich_run(tmp_path / "a" / "run")
    second = rich_run(tmp_path / "b" / "run", "optim.lr=0.125", "train.ema_decay=0.5")
    series = make_run(tmp_path / "series", 5, config="tsm2_traffic")
    done = cli("report", first, second, series)
    assert done.stdout.strip() == "report.html"
    page = parsed(tmp_path / "report.html")
    for text in ("3 runs", "a/run", "b/run", "optim.lr", "0.125", "train.ema_decay", "model.lookback", "val mse"):
        assert text in page.text
    assert "val top1" in page.text


def test_a_run_that_has_just_begun_and_one_with_torn_files(cli: Cli, tmp_path: Path) -> None:
    new = make_run(tmp_path / "new", 0)
    torn = make_run(tmp_path / "torn", 4)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 10, "loss": NaN, "lr": null}\n{"kind": "train", "ste')
    (torn / "forecast.png").write_bytes(b"half")
    noted(torn, "started", job=None, restart=0, hosts=[HERE], world=1, pid=1, host=HERE)
    for run in (new, torn):
        assert cli("report", run).returncode == 0
        parsed(run / "report.html")
    assert "img" not in [tag for tag, _ in parsed(torn / "report.html").seen]


def test_bad_input_is_refused(cli: Cli, tmp_path: Path) -> None:
    done = cli("report", tmp_path / "nothing")
    assert done.returncode == 2
    assert "not a run folder" in done.stderr
    (tmp_path / "file").touch()
    done = cli("report", make_run(tmp_path / "run"), "--out", tmp_path / "file" / "report.html")
    assert done.returncode == 2
    assert "--out" in done.stderr


def test_differences_names_and_thinning() -> None:
    flat = [flattened({"a": {"b": 1, "c": [2]}}), flattened({"a": {"b": 1, "c": [3]}, "d": None})]
    assert list(differences(flat)) == ["a.c", "d"]
    assert distinct_names([Path("/x/run"), Path("/y/run")]) == ["x/run", "y/run"]
    assert distinct_names([Path("/x/one"), Path("/y/two")]) == ["one", "two"]
    points = [(float(i), 0.0) for i in range(100_000)]
    points[777] = (777.0, 5.0)
    points[778] = (778.0, float("nan"))
    kept = thinned(points)
    assert len(kept) <= 800
    assert max(y for _, y in kept) == 5
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


@pytest.mark.slow
def test_a_browser_shows_it(cli: Cli, tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"there is no browser here: none of {', '.join(names)} is on PATH (apt install chromium)")
    runs = [rich_run(tmp_path / name) for name in ("first", "<script>")]
    assert cli("report", *runs, "--out", "report.html").returncode == 0
    picture, address = tmp_path / "page.png", f"file://{tmp_path}/report.html"
    common = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    shot = [*common, f"--screenshot={picture}", "--window-size=1200,3600", address]
    subprocess.run(shot, check=True, capture_output=True, timeout=120)
    seen = np.asarray(Image.open(picture).convert("RGB"))
    assert seen.shape == (3600, 1200, 3)
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 100
    # the curves: a good part of the picture has neither of the two backgrounds
    assert ((seen < 200).any(2)).mean() > 0.01
    dumped = subprocess.run([*common, "--dump-dom", address], check=True, capture_output=True, text=True, timeout=120)
    for text in ("first", "&lt;script&gt;", "train loss", "val top1", "n1, n2"):
        assert text in dumped.stdout
    assert "<script" not in dumped.stdout
