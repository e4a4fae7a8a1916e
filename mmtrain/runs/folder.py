"""The run folder: resolved configuration, code version, metrics, checkpoints, logs, plots and result.

In the folder ``checkpoints``, only entries with exact names are checkpoints. Anything else, such as a copy named
``step_00000020.bak``, is never read or deleted.

The code version of a run consists of mmtrain's version, the git commit, and the uncommitted changes.
"""

from __future__ import annotations

import errno
import json
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmtrain.config import RunConfig, load_config, to_yaml
from mmtrain.config.load import differences
from mmtrain.config.schema import FREE_ON_RESUME
from mmtrain.errors import SharedError, UserError, os_errors
from mmtrain.files import read_json, write_atomically
from mmtrain.runs.reader import check_run_folder
from mmtrain.version import __version__


def run_path(config: RunConfig, run_dir: str | Path | None = None) -> Path:
    """Return the path of the run folder: ``run_dir`` if given, otherwise ``run_root``/``name``."""
    return Path(run_dir) if run_dir is not None else Path(config.run_root) / config.name


class RunFolder:
    """The paths in a run folder, and methods that read and write its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.assets_file = path / "assets.json"
        self.data_file = path / "data.json"
        self.metrics_file = path / "metrics.jsonl"
        self.result_file = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.hangs = path / "hangs"
        self.samples = path / "samples"
        self.faults = path / "faults"
        self.log_file = path / "log.txt"
        self.curves_file = path / "curves.png"
        self.wandb_id_file = path / "wandb_id.txt"

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """Open the existing run folder ``path``.

        Raises:
            UserError: if ``path`` is not a run folder.
        """
        return cls(check_run_folder(path))

    def config(self) -> RunConfig:
        """Load the configuration of the run."""
        return load_config(self.config_file)

    def check(self, config: RunConfig, saved: Path | None = None) -> None:
        """Check that the folder does not contain a run with another configuration.

        Args:
            config: the configuration to compare.
            saved: the saved configuration. Default: ``config.yaml`` of the folder, or of the newest checkpoint if the
                former is missing.

        Raises:
            UserError: if they differ, with the keys. Keys that may change on resume are ignored.
        """
        if saved is None:
            kept = [path / "config.yaml" for path in checkpoints_in(self.checkpoints).values()]
            existing = [file for file in (self.config_file, *reversed(kept)) if file.is_file()]
            if not existing:
                return
            saved = existing[0]
        # The path of a table may change if there is a fingerprint, which identifies the data.
        moved = ("data.path",) if self.data_file.is_file() else ()
        changed = differences(load_config(saved), config, (*FREE_ON_RESUME, *moved))
        if changed:
            where = f"{self.path}" if saved == self.config_file else f"{self.path} (see {saved})"
            raise UserError(
                f"{where} contains a run with another configuration:\n  "
                + "\n  ".join(changed)
                + "\nOmit these changes to resume that run, or start a new run with name=… or --run-dir"
            )

    def prepare(self, config: RunConfig, assets: dict[str, Any], data: dict[str, Any]) -> None:
        """Create the folder of a new run with its small files, or check that an existing one is writable.

        Args:
            assets: data that prediction needs in addition to the weights.
            data: fingerprint of the training data.

        Raises:
            UserError: if the folder cannot be written.
        """
        self.make()
        with self._preparing():
            if not self.config_file.is_file():
                write_atomically(self.path / "code.json", json.dumps(code_version(), indent=1))
                if diff := code_diff(ROOT):
                    write_atomically(self.path / "code.diff", diff)
                self.write_assets(assets)
                self.write_data(data)
                write_atomically(self.config_file, to_yaml(config))

    def make(self) -> None:
        """Create the folder if needed, and check that it is writable.

        Raises:
            UserError: if it is not.
        """
        with self._preparing():
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()

    def _preparing(self) -> AbstractContextManager[None]:
        return os_errors(f"{self.path}: the run folder cannot be written", "choose another with --run-dir")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Convert errors of a full disk or a deleted folder into UserError within this context.

        Other errors are raised unchanged.
        """
        try:
            yield
        except (OSError, SharedError) as error:
            self.check_there(SharedError if isinstance(error, SharedError) else UserError)
            if isinstance(error, SharedError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise UserError(
                f"{self.path}: the run folder could not be written ({error.strerror}). Free some disk space, or choose"
                " another folder with --run-dir. The same command continues from the last good checkpoint"
            ) from error

    def check_there(self, kind: type[UserError] = UserError) -> None:
        """Check that the folder of a training run still contains its configuration.

        Raises:
            UserError: if the folder was deleted or moved. ``kind`` is the class to raise.
        """
        if not self.config_file.is_file():
            raise kind(
                f"{self.path}: the run folder was deleted or moved during training ({self.config_file} is missing)."
                " Nothing can be saved there. If it was moved, its last checkpoint is safe: resume it with --run-dir"
                " and the new path"
            )

    def result(self) -> dict[str, Any] | None:
        """Read the result of a finished run, or return None if the run is not finished.

        Raises:
            UserError: if the file is damaged.
        """
        if not self.result_file.is_file():
            return None
        cure = "delete it and run the same command to test again"
        found = read_json(self.result_file, cure)
        if not (isinstance(found.get("step"), int) and isinstance(found.get("test", 0), dict | None)):
            raise UserError(f"{self.result_file} is damaged: it contains no step and test metrics; {cure}")
        return found

    def write_result(self, result: dict[str, Any]) -> None:
        """Write ``result.json``, which marks the run as finished."""
        write_atomically(self.result_file, json.dumps(result, indent=1))

    def assets(self) -> dict[str, Any]:
        """Read the data that prediction needs in addition to the weights, such as class names.

        Raises:
            UserError: if the file is missing or damaged.
        """
        return read_json(self.assets_file, "restore it, or start a new run with name=…")

    def write_assets(self, assets: dict[str, Any]) -> None:
        """Write ``assets.json``."""
        write_atomically(self.assets_file, json.dumps(assets, indent=1))

    def data(self) -> dict[str, Any] | None:
        """Read the fingerprint of the training data. Return None for a run of version 0.1.0.

        Raises:
            UserError: if the file is damaged.
        """
        if not self.data_file.is_file():
            return None
        return read_json(self.data_file, "restore it, or delete it")

    def write_data(self, data: dict[str, Any]) -> None:
        """Write ``data.json``, the fingerprint of the training data."""
        write_atomically(self.data_file, json.dumps(data))


_CHECKPOINT = re.compile(r"step_(\d{8,18})")
_UNFINISHED = re.compile(r"step_\d{8,18}(\.old)?\.partial")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in ``folder`` by step, oldest first. They are not verified."""
    found = {}
    for path in folder.glob("step_*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.name == checkpoint_name(int(match[1])) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def unfinished_in(folder: Path) -> list[Path]:
    """Return the remains of interrupted saves and deletions in ``folder``."""
    return [path for path in folder.glob("step_*.partial") if _UNFINISHED.fullmatch(path.name)]


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint of the run folder ``run``, or 0."""
    return max(checkpoints_in(run / "checkpoints"), default=0)


#: Root of the source checkout, if mmtrain runs from one.
ROOT = Path(__file__).resolve().parents[2]

#: Maximum size of a stored diff in bytes.
LIMIT = 1_000_000

#: Files whose path contains one of these words, in any case, may contain secrets. Their changes are never stored.
_SECRET = (".env", "key", "secret", "token", "credential", "password", ".pem", "netrc")


def code_version() -> dict[str, Any]:
    """Return the version of the code and of the main packages, as JSON values."""
    packages = {}
    for name in ("torch", "timm", "numpy", "triton", "mamba-ssm"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "mmtrain": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": packages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """Return the git commit of the source checkout, with ``+`` if it has local changes, or None outside a checkout."""
    commit = _git(ROOT, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(ROOT, "status", "--porcelain", "-uno")
    return commit.decode().strip() + ("+" if changes else "") or None


def code_diff(root: Path) -> str | None:
    """Return the uncommitted changes (``git diff HEAD``) of the checkout ``root``, or None if there are none.

    Files that may contain secrets and untracked files are excluded. A diff longer than :data:`LIMIT` is truncated, with
    a note at its end.
    """
    # With rename detection, the diff could quote an excluded file under its other name.
    options = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"]
    found = _git(root, "diff", "HEAD", *options, "--", ".", *(f":(exclude,icase)*{word}*" for word in _SECRET))
    text = (found or b"")[:LIMIT].decode(errors="replace")
    if found and len(found) > LIMIT:
        text += f"\n[truncated: {LIMIT} of {len(found)} bytes]\n"
    return text or None


def _git(root: Path, *arguments: str) -> bytes | None:
    """Run git in the checkout ``root`` and return its output. Return None without a checkout, git or response."""
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
