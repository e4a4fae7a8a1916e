"""The code that a run was started with: versions, the commit, and the changes of the checkout since that commit."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmtrain.version import __version__

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
