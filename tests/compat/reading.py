"""What the commands print and write, as numbers: for the generator of the fixtures and for the test."""

from __future__ import annotations

import csv
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

FIXTURES = Path(__file__).parent / "fixtures"

#: The runs that were stopped in the middle: ``runs/KIND_STRATEGY``.
KINDS = ("vision", "forecast")
STRATEGIES = {"none": 1, "ddp": 2, "fsdp": 2, "zero2": 2}  # and the number of ranks

#: Stands in ``meta.json`` for the folder that holds ``data``: a prepared dataset names its source by an absolute path.
HERE = "{HERE}"

#: How the archives end. The files of a checkpoint are mostly padding, the pages of a beton nearly all zeros.
PACKED = ".tar.xz"

#: The modification time of all fixtures, in seconds: the index of a shard remembers that of the shard.
TIME = 1_750_000_000

#: How the datasets are prepared: the same commands later say that they are there already.
PREPARE = {
    "shards": ["data", "prepare", "images", "--root", "data/photos", "--out", "data/shards", "--workers", "1"],
    "betons": ["data", "prepare", "ffcv", "--root", "data/shards", "--out", "data/betons", "--page-size", "2"],
    "panel": ["data", "prepare", "panel", "--root", "data/sales.csv", "--out", "data/panel", "--id", "shop"],
}
PREPARE["shards"] += ["--val-fraction", "0.1", "--test-fraction", "0.2"]
PREPARE["betons"] += ["--workers", "1"]
PREPARE["panel"] += ["--columns", "sold", "--known", "price", "--static", "city", "--last", "14,14"]

#: The images that classes are predicted of.
IMAGES = [f"data/photos/digit_{label}/00.png" for label in range(4)]

#: The shapes of the inputs that the exports were tried on.
SHAPES = {"vision": (3, 3, 16, 16), "forecast": (3, 32, 2)}


def pack(folder: Path, to: Path) -> None:
    """Pack ``folder`` into the archive ``to``, without owners and with one time: git keeps none."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mtime = TIME
        return member

    to.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(to, "w:xz", preset=9) as archive:
        archive.add(folder, folder.name, filter=plain)


def unpack(to: Path, *names: str) -> None:
    """Unpack the fixtures ``names``, such as "data" and "runs/vision_none" (none: all of them), into ``to``."""
    for packed in [FIXTURES / f"{name}{PACKED}" for name in names] or sorted(FIXTURES.rglob(f"*{PACKED}")):
        with tarfile.open(packed) as archive:
            archive.extractall(to / packed.relative_to(FIXTURES).parent, filter="data")
    for meta in to.glob("data/*/meta.json"):
        meta.write_text(meta.read_text().replace(HERE, str(to)))
        os.utime(meta, (TIME, TIME))


def set_times(folder: Path) -> None:
    """Give all files one modification time, that of the archives."""
    for file in folder.rglob("*"):
        if file.is_file():
            os.utime(file, (TIME, TIME))


def example(kind: str) -> NDArray[np.float32]:
    """A fixed input of an export."""
    shape = SHAPES[kind]
    return np.sin(0.37 * np.arange(np.prod(shape)).reshape(shape)).astype(np.float32)


def state_and_step(listing: str, run: str) -> list[str]:
    """Of ``run`` in the table that ``mmtrain runs`` prints, such as ["stopped", "9/21"]."""
    rows = [line.split() for line in listing.splitlines() if line.split()[:1] == [run]]
    assert len(rows) == 1, listing
    return rows[0][2:4]


def probabilities(text: str) -> dict[str, dict[str, float]]:
    """By image and class, from what ``mmtrain predict`` prints of images."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"\s+([\d.]+)%\s+(\S+)", line):
            found[list(found)[-1]][match[2]] = float(match[1]) / 100
        else:
            found[line] = {}
    return found


def table(file: Path) -> dict[str, list[float]]:
    """The columns of numbers of a CSV that ``mmtrain predict`` wrote."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found: dict[str, list[float]] = {}
    for name in rows[0]:
        try:
            found[name] = [float(row[name]) for row in rows]
        except ValueError:  # dates, ids
            continue
    return found


def evaluated(text: str) -> dict[str, float]:
    """What ``mmtrain eval`` prints."""
    return dict(json.loads(text[text.index("{") :]))


def result(run: Path) -> dict[str, float]:
    """The step and the test metrics of a finished run."""
    found = json.loads((run / "result.json").read_text())
    return {"step": found["step"], **found["test"]}


def options(help: str) -> list[str]:
    """The options that a ``--help`` names at the beginning of a line."""
    return sorted({name for line in help.splitlines() for name in re.findall(r"^  (?:-\w, )?(--[\w-]+)", line)})


def subcommands(help: str) -> list[str]:
    """The commands that a ``--help`` names."""
    _, _, below = help.partition("\nCommands:\n")
    return re.findall(r"^  ([a-z]\S*)", below, re.MULTILINE)


def settings(text: str) -> dict[str, Any]:
    """A configuration in YAML as dotted keys."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for name, each in value.items() for k, v in flat(each, f"{prefix}.{name}".strip(".")).items()}

    return flat(yaml.safe_load(text), "")
