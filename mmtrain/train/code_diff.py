"""What the checkout that a run was started from has beside its commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

#: The most that is kept, in bytes.
LIMIT = 1_000_000

#: Files that may hold secrets, by any part of their path, in any case. Their changes are never written down.
_SECRET = (".env", "key", "secret", "token", "credential", "password", ".pem", "netrc")


def code_diff(root: Path) -> str | None:
    """``git diff HEAD`` of the checkout ``root``, without files that may hold secrets; None where there is none.

    Only tracked files count. What goes beyond :data:`LIMIT` is cut off, and said.
    """
    if not (root / ".git").exists():
        return None
    left_out = [f":(exclude,icase)*{word}*" for word in _SECRET]
    # no rename detection: it would name, and quote, a file that is left out under its other name
    options = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "diff", "HEAD", *options, "--", ".", *left_out], capture_output=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout[:LIMIT].decode(errors="replace")
    if len(done.stdout) > LIMIT:
        text += f"\n[cut off: {LIMIT} of {len(done.stdout)} bytes]\n"
    return text or None
