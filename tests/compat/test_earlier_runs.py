"""What mmtrain 0.1.0 left behind is still read: runs go on to the same figures, exports and datasets open.

The fixtures are never made again; ``make_fixtures.py`` says how they were made. Everything is done through the command
line and the few functions that users import, so that modules may move.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.inference import from_pretrained, load_trained
from mmtrain.models import create_model
from tests.compat import reading
from tests.conftest import Cli

ROOT = Path(__file__).resolve().parents[2]
EXPECTED: dict[str, Any] = json.loads((reading.FIXTURES / "expected.json").read_text())
SURFACE: dict[str, Any] = json.loads((reading.FIXTURES / "surface.json").read_text())
COMMANDS = [name for name in SURFACE if name.startswith(("mmtrain", "launch/"))]
CONFIGS = [name for name in SURFACE if name not in COMMANDS]
RUNS = list(EXPECTED["resumed"])

#: A forward pass on another processor, or with sums in another order, is off by about 1e-6.
FORWARD = 1e-4
#: Final figures of version 0.1.0 differ by up to 6e-5 from strategy to strategy, by rounding alone. Without the moments
#: of the optimizer they are off by 8e-3 to 0.5.
RESUMED = 2e-3
#: Version 0.1.0 used the best checkpoint unless told otherwise, whatever ``eval.select`` said.
BEST = ("--checkpoint", "best")
#: Percentages are printed with two digits.
PRINTED = 2e-4


@pytest.fixture
def here(tmp_path: Path, cli: Cli) -> Path:
    """The folder that ``cli`` runs in."""
    return tmp_path


def has(module: str, extra: str) -> None:
    """Skip the test where an optional package is missing."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'mmtrain[{extra}]'")


def done(cli: Cli, *words: object) -> str:
    """What a command prints that must succeed."""
    ended = cli(*words)
    assert ended.returncode == 0, f"{words}: {ended.stdout}\n{ended.stderr}"
    return ended.stdout


def same(found: Any, expected: Any, rel: float, near: float = 1e-6) -> None:
    """The same numbers under the same names; a share of right answers may be off by one of 16 images."""
    if isinstance(expected, dict):
        assert set(expected) <= set(found)
        for name, value in expected.items():
            if name in ("top1", "top5"):
                assert found[name] == pytest.approx(value, abs=100 / 16 + 0.01)
            else:
                same(found[name], value, rel, near)
    else:
        np.testing.assert_allclose(found, expected, rtol=rel, atol=near)


def predicted(cli: Cli, here: Path, name: str) -> Any:
    """What the run or export ``name`` predicts, as ``expected.json`` has it."""
    if "vision" in name:
        return reading.probabilities(done(cli, "predict", name, *reading.IMAGES, *BEST))
    file, back = ("data/panel", 7) if "panel" in name else ("data/waves.csv", 8)
    done(cli, "predict", name, file, "--back", back, "--out", "predicted", *BEST)
    return reading.table(here / "predicted" / f"{Path(file).stem}_forecast.csv")


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and digest of every file."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(f): (f.stat().st_mtime_ns, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files}


def train_lines(run: Path, until: int) -> list[str]:
    """The lines of metrics of the training steps up to ``until``, as they were written."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if (read := json.loads(line))["kind"] == "train" and read["step"] <= until]


# ---------------------------------------------------------------- runs that were stopped


def test_stopped_runs_are_listed(cli: Cli, here: Path) -> None:
    reading.unpack(here, *(f"runs/{name}" for name in RUNS))
    listing = done(cli, "runs")
    for name, expected in EXPECTED["listed"].items():
        assert reading.state_and_step(listing, f"runs/{name}") == expected
    assert "runs/vision_none" in done(cli, "runs", "list", "runs")
    assert "step 1/" in done(cli, "runs", "logs", "runs/vision_none")
    assert Path(here, done(cli, "report", "runs/vision_fsdp", "runs/forecast_zero2").split()[0]).stat().st_size > 1000


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_is_evaluated(name: str, cli: Cli, here: Path) -> None:
    reading.unpack(here, "data", f"runs/{name}")
    found = reading.evaluated(done(cli, "eval", f"runs/{name}", "--split", "val", "--checkpoint", "last"))
    same(found, EXPECTED["stopped"][name], FORWARD)


def go_on(name: str, ranks: int, strategy: str, cli: Cli, here: Path) -> None:
    """Resume ``runs/NAME``: one rank in this process, several through the launcher."""
    path = f"runs/{name}"
    override = [f"parallel.strategy={strategy}"]
    if ranks == 1:
        done(cli, "train", "--config", f"{path}/config.yaml", "--run-dir", path, *override)
        return
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--resume", path, "--local", str(ranks), *override]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy", "ranks"),
    [
        ("vision_none", "none", 1),
        ("vision_ddp", "ddp", 1),
        ("vision_fsdp", "fsdp", 2),
        ("vision_fsdp", "none", 1),
        ("vision_zero2", "none", 1),
        ("forecast_none", "none", 1),
        ("forecast_ddp", "ddp", 1),
        ("forecast_fsdp", "fsdp", 2),
        ("forecast_zero2", "zero2", 2),
    ],
)
def test_a_stopped_run_goes_on(name: str, strategy: str, ranks: int, cli: Cli, here: Path) -> None:
    if strategy == "zero2":
        has("deepspeed", "deepspeed")
    run, expected = here / "runs" / name, EXPECTED["resumed"][name]
    reading.unpack(here, "data", f"runs/{name}")
    step = max(int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*"))
    before = train_lines(run, step)

    go_on(name, ranks, strategy, cli, here)
    # a run that begins anew would come to the same figures: what was done before must not be done again
    assert len(before) == step
    assert train_lines(run, step) == before
    steps = [json.loads(line)["step"] for line in train_lines(run, 1000)]
    assert steps == list(range(1, expected["result"]["step"] + 1))
    same(reading.result(run), expected["result"], RESUMED)

    path = f"runs/{name}"
    same(reading.evaluated(done(cli, "eval", path, *BEST)), expected["evaluated"], RESUMED)
    same(predicted(cli, here, path), expected["predicted"], RESUMED, RESUMED)
    last = expected["result"]["step"]
    assert reading.state_and_step(done(cli, "runs"), path) == ["finished", f"{last}/{last}"]
    done(cli, "report", path)
    assert (run / "report.html").stat().st_size > 1000


# ---------------------------------------------------------------- finished runs


@pytest.mark.parametrize("kind", list(EXPECTED["finished"]))
def test_a_finished_run_is_used(kind: str, cli: Cli, here: Path) -> None:
    name, expected = f"finished/{kind}", EXPECTED["finished"][kind]
    reading.unpack(here, "data", name)
    before = {file: kept for file, kept in contents(here).items() if not file.endswith("jobs.jsonl")}
    same(reading.evaluated(done(cli, "eval", name, *BEST)), expected["evaluated"], FORWARD)
    tested = {metric: value for metric, value in expected["result"].items() if metric != "step"}
    same(reading.evaluated(done(cli, "eval", name)), tested, FORWARD)
    done(cli, "train", "--config", f"{name}/config.yaml", "--run-dir", name)
    done(cli, "model", name)
    assert {file: kept for file, kept in contents(here).items() if file in before} == before
    same(reading.result(here / name), expected["result"], FORWARD)
    same(predicted(cli, here, name), expected["predicted"], FORWARD, PRINTED)
    assert reading.state_and_step(done(cli, "runs", "finished"), name)[0] == "finished"
    assert load_trained(here / name).step is not None


@pytest.mark.slow
def test_a_finished_run_is_evaluated_on_betons(cli: Cli, here: Path) -> None:
    has("ffcv", "ffcv")
    reading.unpack(here, "data", "finished/vision")
    found = reading.evaluated(done(cli, "eval", "finished/vision", "data.kind=ffcv", "data.root=data/betons", *BEST))
    same(found, EXPECTED["finished"]["vision"]["evaluated_on_betons"], FORWARD)


@pytest.mark.parametrize("kind", reading.KINDS)
def test_a_finished_run_is_exported(kind: str, cli: Cli, here: Path) -> None:
    reading.unpack(here, f"finished/{kind}", f"exports/{kind}_safetensors")
    done(cli, "export", f"finished/{kind}", "--out", "exported", *BEST)
    earlier, now = (from_pretrained(here / folder) for folder in (f"exports/{kind}_safetensors", "exported"))
    assert list(earlier.state_dict()) == list(now.state_dict())
    for name, weight in earlier.state_dict().items():
        assert torch.equal(weight, now.state_dict()[name]), name


# ---------------------------------------------------------------- exports


@pytest.mark.parametrize("kind", reading.KINDS)
def test_exported_weights_are_loaded(kind: str, cli: Cli, here: Path) -> None:
    from safetensors.torch import load_file

    folder = f"exports/{kind}_safetensors"
    reading.unpack(here, "data", folder)
    given, expected = torch.from_numpy(reading.example(kind)), EXPECTED["exported"][kind]
    settings = reading.settings((here / folder / "config.yaml").read_text())
    size = {key.removeprefix("model."): value for key, value in settings.items() if key.startswith("model.")}
    built = create_model(size.pop("name"), **size)
    built.load_state_dict(load_file(here / folder / "model.safetensors"))
    with torch.no_grad():
        for model in (from_pretrained(here / folder), load_trained(here / folder).model, built.eval()):
            same(model(given).numpy(), expected, FORWARD, FORWARD)
    same(predicted(cli, here, folder), EXPECTED["finished"][kind]["predicted"], FORWARD, PRINTED)


@pytest.mark.parametrize("kind", reading.KINDS)
def test_an_exported_program_is_run(kind: str, here: Path) -> None:
    reading.unpack(here, f"exports/{kind}_torch")
    program = torch.export.load(here / "exports" / f"{kind}_torch" / "model.pt2").module()
    with torch.no_grad():
        same(program(torch.from_numpy(reading.example(kind))).numpy(), EXPECTED["exported"][kind], FORWARD, FORWARD)


@pytest.mark.parametrize("kind", reading.KINDS)
def test_an_exported_graph_is_run(kind: str, here: Path) -> None:
    has("onnxruntime", "export")
    import onnxruntime

    reading.unpack(here, f"exports/{kind}_onnx")
    file = here / "exports" / f"{kind}_onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: reading.example(kind)})
    same(found, EXPECTED["exported"][kind], FORWARD, FORWARD)


# ---------------------------------------------------------------- datasets, commands and configurations


@pytest.mark.parametrize("name", list(reading.PREPARE))
def test_a_dataset_is_not_prepared_again(name: str, cli: Cli, here: Path) -> None:
    reading.unpack(here, "data")
    before = contents(here)
    assert "already exists" in done(cli, *reading.PREPARE[name])
    assert contents(here) == before


def test_tables_and_panels_are_described(cli: Cli, here: Path) -> None:
    reading.unpack(here, "data")
    for path in ("data/waves.csv", "data/panel"):
        done(cli, "data", "describe", path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_the_options_it_took(command: str, cli: Cli) -> None:
    program, *words = command.split()
    given = [program] if program != "mmtrain" else []
    assert set(SURFACE[command]) <= set(reading.options(done(cli, *given, *words, "--help")))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_configuration_means_what_it_meant(name: str, cli: Cli) -> None:
    found = reading.settings(done(cli, "train", "--config", name, "--print-config"))
    assert {key: found.get(key) for key in SURFACE[name]} == SURFACE[name]
