"""A run is a folder: resolved configuration, code version, metrics, checkpoints, logs, pictures, result.

Among the entries of its folder ``checkpoints`` only exact names count: whatever else lies there (a copy named
``step_00000020.bak``) is never read and never deleted.

The code that a run was started with is its version, the commit, and the changes of the checkout since that commit.
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
    """The run folder: ``run_dir`` if given, else ``run_root``/``name``."""
    return Path(run_dir) if run_dir is not None else Path(config.run_root) / config.name


class RunFolder:
    """The paths of a run, and its small files."""

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
        """The run in ``path``.

        Raises:
            UserError: when there is none.
        """
        return cls(check_run_folder(path))

    def config(self) -> RunConfig:
        return load_config(self.config_file)

    def check(self, config: RunConfig, saved: Path | None = None) -> None:
        """Refuse a folder that holds a run of another configuration.

        ``saved``: the file to compare with; ``config.yaml`` if None, or that of the newest checkpoint where it is gone.

        Raises:
            UserError: with the keys that differ.
        """
        if saved is None:
            kept = [path / "config.yaml" for path in checkpoints_in(self.checkpoints).values()]
            there = [file for file in (self.config_file, *reversed(kept)) if file.is_file()]
            if not there:
                return
            saved = there[0]
        # a table or a panel may lie at another place where the fingerprint says whether it is the same data
        moved = ("data.path",) if self.data_file.is_file() else ()
        changed = differences(load_config(saved), config, (*FREE_ON_RESUME, *moved))
        if changed:
            where = f"{self.path}" if saved == self.config_file else f"{self.path} (see {saved})"
            raise UserError(
                f"{where} holds a run of another configuration:\n  "
                + "\n  ".join(changed)
                + "\nGo on with the old one by leaving these out, or start a new run with name=… or --run-dir"
            )

    def prepare(self, config: RunConfig, assets: dict[str, Any], data: dict[str, Any]) -> None:
        """Make the folder of a new run, or see that the one there can be written.

        ``data``: the fingerprint of its training data.

        Raises:
            UserError: when it cannot.
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
        """Make the folder, or see that the one there can be written.

        Raises:
            UserError: when it cannot.
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
        """Within the context a full disk or a folder that is gone is the user's error; others keep their traceback."""
        try:
            yield
        except (OSError, SharedError) as error:
            self.check_there(SharedError if isinstance(error, SharedError) else UserError)
            if isinstance(error, SharedError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise UserError(
                f"{self.path}: the run folder could not be written ({error.strerror}). Free or grow the disk, or give"
                " another folder with --run-dir; the same command goes on from the last good checkpoint"
            ) from error

    def check_there(self, kind: type[UserError] = UserError) -> None:
        """See that the folder of a run that trains still holds its configuration.

        Raises:
            UserError: of the given kind, where it was deleted or moved.
        """
        if not self.config_file.is_file():
            raise kind(
                f"{self.path}: the run folder was deleted or moved while the run trained: {self.config_file} is gone,"
                " and nothing can be saved there. If it was moved, its last checkpoint is safe: give the new place with"
                " --run-dir"
            )

    def result(self) -> dict[str, Any] | None:
        """What a finished run came to, or None while it is not finished.

        Raises:
            UserError: for a file that is damaged.
        """
        if not self.result_file.is_file():
            return None
        cure = "remove it, and the same command tests the run again"
        found = read_json(self.result_file, cure)
        if not (isinstance(found.get("step"), int) and isinstance(found.get("test", 0), dict | None)):
            raise UserError(f"{self.result_file} is damaged: it has no step and test figures; {cure}")
        return found

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.result_file, json.dumps(result, indent=1))

    def assets(self) -> dict[str, Any]:
        """What a prediction needs to know of the training data.

        Raises:
            UserError: for a file that is missing or damaged.
        """
        return read_json(self.assets_file, "restore it, or start a new run with name=…")

    def write_assets(self, assets: dict[str, Any]) -> None:
        write_atomically(self.assets_file, json.dumps(assets, indent=1))

    def data(self) -> dict[str, Any] | None:
        """The fingerprint of the data; None in a run of an earlier version.

        Raises:
            UserError: for a damaged file.
        """
        if not self.data_file.is_file():
            return None
        return read_json(self.data_file, "restore it, or delete it")

    def write_data(self, data: dict[str, Any]) -> None:
        write_atomically(self.data_file, json.dumps(data))


_CHECKPOINT = re.compile(r"step_(\d{8,18})")
_UNFINISHED = re.compile(r"step_\d{8,18}(\.old)?\.partial")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in ``folder`` by their steps, the oldest first. Whether they are whole is not looked at."""
    found = {}
    for path in folder.glob("step_*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.name == checkpoint_name(int(match[1])) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def unfinished_in(folder: Path) -> list[Path]:
    """What an interrupted save, or an interrupted deletion, left in ``folder``."""
    return [path for path in folder.glob("step_*.partial") if _UNFINISHED.fullmatch(path.name)]


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint of the run folder ``run``, 0 without one."""
    return max(checkpoints_in(run / "checkpoints"), default=0)


#: Where the source checkout is, if mmtrain runs from one.
ROOT = Path(__file__).resolve().parents[2]

#: The most that is kept of a diff, in bytes.
LIMIT = 1_000_000

#: Files that may hold secrets, by any part of their path, in any case. Their changes are never written down.
_SECRET = (".env", "key", "secret", "token", "credential", "password", ".pem", "netrc")


def code_version() -> dict[str, Any]:
    """The code and packages that a run was made with."""
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
    """The git commit of the source checkout, with ``+`` when it has local changes; None outside a checkout."""
    commit = _git(ROOT, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(ROOT, "status", "--porcelain", "-uno")
    return commit.decode().strip() + ("+" if changes else "") or None


def code_diff(root: Path) -> str | None:
    """``git diff HEAD`` of the checkout ``root``, without files that may hold secrets; None where there is none.

    Only tracked files count. What goes beyond :data:`LIMIT` is cut off, and said.
    """
    # no rename detection: it would name, and quote, a file that is left out under its other name
    options = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"]
    found = _git(root, "diff", "HEAD", *options, "--", ".", *(f":(exclude,icase)*{word}*" for word in _SECRET))
    text = (found or b"")[:LIMIT].decode(errors="replace")
    if found and len(found) > LIMIT:
        text += f"\n[cut off: {LIMIT} of {len(found)} bytes]\n"
    return text or None


def _git(root: Path, *words: str) -> bytes | None:
    """What git says of the checkout ``root``; None where there is no checkout, no git or no answer."""
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
