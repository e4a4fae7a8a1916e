"""Make ``tests/compat/fixtures``: data, runs and exports as mmtrain 0.1.0 left them.

The fixtures were made by version 0.1.0, and are not made again: a later version must read what an earlier one wrote.
To see how they came about, or to make more with another earlier version, run this in a checkout of that version::

    python -m tests.compat.make_fixtures

It needs the extras demo, export, deepspeed and ffcv. Everything runs from the folder of the fixtures, so that all paths
in them are relative. The name of this machine is replaced in the files that hold it.

- ``data``: images of four digits, as files (one of each), shards and betons; a table; a panel of four series.
- ``runs``: two kinds under four strategies, each stopped in the middle in another way.
- ``finished``: a run of each kind that came to its end.
- ``exports``: the finished runs in all formats.
- ``expected.json``: what 0.1.0 made of all these afterwards. ``resumed`` is of one process; several came within 1e-5.
- ``surface.json``: the commands with their options, and the shipped configurations with their values.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.compat import reading

ROOT = Path(__file__).resolve().parents[2]
MMTRAIN = [sys.executable, "-m", "mmtrain"]
SUBMIT = [sys.executable, str(ROOT / "launch" / "submit.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

IMAGES = ["data.root=data/shards", "data.image_size=16", "model.num_classes=4", "model.dims=[16]"]
IMAGES += [
    "model.token_mixers=[2]",
    "model.channel_expand=[1]",
    "model.expand=1",
    "model.state=2",
    "model.patch_size=4",
]
IMAGES += [
    "optim.lr=5e-2",
    "optim.warmup_epochs=0.5",
    "task.label_smoothing=0",
    "train.batch_size=8",
    "train.epochs=4",
    "train.ema_decay=0.8",
]
IMAGES += ["train.log_every=1", "tracking.plots=false"]
SERIES = ["data.path=data/waves.csv", "data.split=ratio", "data.stride=2", "model.lookback=32", "model.horizon=8"]
SERIES += ["model.patch_size=8", "model.patch_stride=4", "model.dim=8", "model.depth=1", "model.state=4"]
SERIES += ["optim.lr=5e-3", "train.batch_size=16", "train.epochs=2", "eval.every_steps=5", "train.log_every=1"]
SERIES += ["tracking.plots=false"]
PANEL = ["data.path=data/panel", "data.known=[price]", "data.static=[city]", "data.calendar=false", "data.stride=4"]
PANEL += ["model.lookback=21", "model.horizon=7", "model.patch_size=7", "model.patch_stride=7", "model.dim=8"]
PANEL += ["model.depth=1", "model.state=4", "model.future_features=1", "model.static_features=2"]
PANEL += ["train.batch_size=8", "train.epochs=2", "train.log_every=1", "tracking.plots=false"]
START = {
    "vision": ["--config", "vim2_digits", *IMAGES],
    "forecast": ["--config", "tsm2_etth1", *SERIES],
    "panel": ["--config", "tsm2_m5", *PANEL],
}
FORMATS = ("safetensors", "torch", "onnx")


def run(*command: str, at: Path) -> str:
    """What ``command`` prints, run in the folder ``at``."""
    done = subprocess.run(command, cwd=at, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def make_data(at: Path) -> None:
    """``data``: prepared by the commands."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, data = load_digits(), at / "data"
    for label in range(4):
        folder = data / "photos" / f"digit_{label}"
        folder.mkdir(parents=True)
        for number, scan in enumerate(digits.images[digits.target == label][:20]):
            image = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
            image.resize((16, 16), Image.Resampling.LANCZOS).save(folder / f"{number:02d}.png")
    hours = np.arange(400)
    noise = np.random.default_rng(0).normal(scale=0.1, size=(400, 2))
    values = np.sin(2 * np.pi * (hours[:, None] / 24 + np.array([0.0, 0.3]))) + noise
    stamps = np.datetime64("2026-01-01T00") + hours.astype("timedelta64[h]")
    rows = [f"{t},{row[0]:.3f},{row[1]:.3f}" for t, row in zip(stamps, values, strict=True)]
    (data / "waves.csv").write_text("date,a,b\n" + "\n".join(rows) + "\n")
    lines = ["shop,date,sold,price,city"]
    for shop, city in enumerate(["north", "south", "south", "north"]):
        for day in range(80 + 5 * shop):
            sold, price = 20 + 5 * shop + 8 * np.sin(2 * np.pi * day / 7), 2 + (day + shop) % 5
            lines.append(f"s{shop},{np.datetime64('2026-01-01') + day},{sold - price:.2f},{price},{city}")
    (data / "sales.csv").write_text("\n".join(lines) + "\n")

    run(*MMTRAIN, *reading.PREPARE["shards"], at=at)
    for extra in data.glob("photos/*/*.png"):  # a prepared dataset only looks whether the folder is there
        if extra.name != "00.png":
            extra.unlink()
    reading.set_times(at)
    run(*MMTRAIN, "data", "index", *(f"data/shards/{split}" for split in ("train", "val", "test")), at=at)
    run(*MMTRAIN, *reading.PREPARE["betons"], at=at)
    run(*MMTRAIN, *reading.PREPARE["panel"], at=at)


def kill(launched: subprocess.Popen[bytes], folder: Path) -> None:
    """All processes at once, without a word."""
    os.killpg(launched.pid, signal.SIGKILL)


def ask(launched: subprocess.Popen[bytes], folder: Path) -> None:
    run(*MMTRAIN, "runs", "stop", f"runs/{folder.name}", at=folder.parents[1])


def send(number: signal.Signals) -> Callable[[subprocess.Popen[bytes], Path], None]:
    return lambda launched, folder: launched.send_signal(number)


#: How each run is stopped, and what has to be there before.
STOPS: dict[str, tuple[Callable[[subprocess.Popen[bytes], Path], None], str]] = {
    "vision_none": (send(signal.SIGTERM), '"step": 9'),
    "vision_ddp": (send(signal.SIGUSR2), '"step": 3'),
    "vision_fsdp": (kill, "checkpoint"),
    "vision_zero2": (ask, '"step": 3'),
    "forecast_none": (send(signal.SIGINT), '"step": 3'),
    "forecast_ddp": (kill, "checkpoint"),
    "forecast_fsdp": (send(signal.SIGUSR2), '"step": 3'),
    "forecast_zero2": (send(signal.SIGTERM), '"step": 6'),
}


def make_run(name: str, at: Path) -> None:
    """Start ``runs/NAME`` and stop it in the middle."""
    kind, strategy = name.split("_")
    stop, sign = STOPS[name]
    folder, ranks = at / "runs" / name, reading.STRATEGIES[strategy]
    command = [*SUBMIT, *START[kind], f"name={name}", "--local", str(ranks), f"parallel.strategy={strategy}"]
    with tempfile.TemporaryFile() as said:
        launched = subprocess.Popen(command, cwd=at, env=ENVIRONMENT, stdout=said, stderr=said, start_new_session=True)
        while launched.poll() is None and not _is_there(sign, folder):
            time.sleep(0.002)
        if launched.poll() is None:
            stop(launched, folder)
        status = launched.wait(timeout=120)
        said.seek(0)
        text = said.read().decode()
    if (folder / "result.json").exists() or not list(folder.glob("checkpoints/step_*/manifest.json")):
        raise RuntimeError(f"{name} was not stopped in the middle: status {status}\n{text}")
    for unfinished in folder.glob("checkpoints/*.partial"):
        shutil.rmtree(unfinished)


def _is_there(sign: str, folder: Path) -> bool:
    if sign == "checkpoint":
        return any(path.suffix != ".partial" for path in folder.glob("checkpoints/step_*"))
    metrics = folder / "metrics.jsonl"
    return metrics.is_file() and f"{sign}," in metrics.read_text()


def make_finished(kind: str, at: Path) -> None:
    """Train ``finished/KIND`` to its end, and export it."""
    run(*MMTRAIN, "train", *START[kind], "run_root=finished", f"name={kind}", "checkpoint.keep=1", at=at)
    for format in FORMATS if kind in reading.SHAPES else ():
        run(*MMTRAIN, "export", f"finished/{kind}", "--out", f"exports/{kind}_{format}", "--format", format, at=at)


def neutral(at: Path) -> None:
    """Replace what belongs to this machine; what a checkpoint's manifest vouches for holds none of it."""
    import onnx

    for file in sorted(at.rglob("*")):
        if file.is_file() and file.suffix in (".json", ".jsonl", ".txt", ".yaml"):
            text = file.read_text()
            text = (
                text.replace(f'"{socket.gethostname()}"', '"node1"')
                .replace(str(at), reading.HERE)
                .replace(f"{ROOT}/", "")
            )
            if text != file.read_text():
                assert "checkpoints" not in file.parts, file
                file.write_text(text)
        elif file.suffix == ".onnx":  # each node names the source that it was traced from
            model = onnx.load(file)
            for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
                del node.metadata_props[:]
            onnx.save(model, file)
        elif file.suffix == ".png" and "photos" not in file.parts:
            file.unlink()


def predicted(name: str, at: Path) -> Any:
    """What the run or export ``name`` predicts."""
    folder = f"{at.name}_{re.sub(r'[^a-z0-9]', '_', name)}"
    if "vision" in name:
        return reading.probabilities(run(*MMTRAIN, "predict", name, *reading.IMAGES, at=at))
    file, back = ("data/panel", "7") if "panel" in name else ("data/waves.csv", "8")
    run(*MMTRAIN, "predict", name, file, "--back", back, "--out", folder, at=at)
    return reading.table(at / folder / f"{Path(file).stem}_forecast.csv")


def expect() -> dict[str, Any]:
    """What this version makes of the fixtures."""
    found: dict[str, Any] = {"listed": {}, "stopped": {}, "resumed": {}, "finished": {}, "exported": {}}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as several:
        alone, together = Path(one), Path(several)
        reading.unpack(alone)
        reading.unpack(together)
        listing = run(*MMTRAIN, "runs", at=alone)
        for name in STOPS:
            path = f"runs/{name}"
            found["listed"][name] = reading.state_and_step(listing, path)
            words = [*MMTRAIN, "eval", path, "--split", "val", "--checkpoint", "last"]
            found["stopped"][name] = reading.evaluated(run(*words, at=alone))
            run(*SUBMIT, "--resume", path, "--local", "1", "parallel.strategy=none", at=alone)
            run(*SUBMIT, "--resume", path, "--local", str(reading.STRATEGIES[name.split("_")[1]]), at=together)
            result, other = (reading.result(folder / path) for folder in (alone, together))
            print(name, found["listed"][name], result)
            np.testing.assert_allclose(list(other.values()), list(result.values()), rtol=1e-5)
            found["resumed"][name] = {
                "result": result,
                "evaluated": reading.evaluated(run(*MMTRAIN, "eval", path, at=alone)),
                "predicted": predicted(path, alone),
            }
        for kind in START:
            words = [*MMTRAIN, "eval", f"finished/{kind}"]
            found["finished"][kind] = {
                "result": reading.result(alone / "finished" / kind),
                "evaluated": reading.evaluated(run(*words, at=alone)),
                "predicted": predicted(f"finished/{kind}", alone),
            }
            if kind in reading.SHAPES:
                found["exported"][kind] = exported(alone / "finished" / kind, kind)
            if kind == "vision":
                words += ["data.kind=ffcv", "data.root=data/betons"]
                found["finished"][kind]["evaluated_on_betons"] = reading.evaluated(run(*words, at=alone))
    return found


def exported(model: str | Path, kind: str) -> list[Any]:
    """What the model in the folder ``model`` makes of a fixed input."""
    import torch

    from mmtrain.inference import load_trained

    with torch.no_grad():
        made = load_trained(model).model(torch.from_numpy(reading.example(kind)))
    return list(made.tolist())


def surface() -> dict[str, Any]:
    """The commands with their options, and the keys of each shipped configuration with their values."""
    found: dict[str, Any] = {}
    waiting: list[list[str]] = [[]]
    while waiting:
        words = waiting.pop()
        text = run(*MMTRAIN, *words, "--help", at=ROOT)
        found[" ".join(["mmtrain", *words])] = reading.options(text)
        waiting += [[*words, name] for name in reading.subcommands(text)]
    found["launch/submit.py"] = reading.options(run(*SUBMIT, "--help", at=ROOT))
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        if file.parent.name != "base":
            name = file.relative_to(ROOT / "configs").with_suffix("").as_posix()
            found[name] = reading.settings(run(*MMTRAIN, "train", "--config", name, "--print-config", at=ROOT))
    return found


def main() -> None:
    at = reading.FIXTURES
    if at.exists():
        sys.exit(f"{at} is there already: remove it first")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve() / "fixtures"
        work.mkdir()
        make_data(work)
        for name in STOPS:
            make_run(name, work)
        for kind in START:
            make_finished(kind, work)
        neutral(work)
        reading.pack(work / "data", at / f"data{reading.PACKED}")
        for group in ("runs", "finished", "exports"):
            for made in sorted((work / group).iterdir()):
                reading.pack(made, at / group / f"{made.name}{reading.PACKED}")
    (at / "expected.json").write_text(json.dumps(expect(), indent=1) + "\n")
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in surface().items()]
    (at / "surface.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
