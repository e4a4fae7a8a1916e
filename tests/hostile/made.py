"""A small run that was stopped in the middle: its paths, the commands that read it, and a manifest for a copy of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

RUN = "runs/forecast_none"
EXPORT = "exports/forecast_safetensors"
TABLE = "data/waves.csv"


def newest(folder: Path) -> Path:
    """The newest checkpoint of the run in ``folder``."""
    return max((folder / RUN / "checkpoints").glob("step_*"))


def sign(checkpoint: Path) -> None:
    """Make the manifest fit the files that are there."""
    file = checkpoint / "manifest.json"
    paths = [path for path in checkpoint.iterdir() if path.is_file() and path != file]
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    file.write_text(json.dumps({p.name: {"size": p.stat().st_size, "sha256": digests[p.name]} for p in paths}))


#: The commands that read a checkpoint.
USES = {
    "predict": ("predict", RUN, TABLE),
    "eval": ("eval", RUN),
    "export": ("export", RUN, "--out", "exported"),
    "model": ("model", RUN),
    "resume": ("train", "--config", f"{RUN}/config.yaml", "--run-dir", RUN),
}
