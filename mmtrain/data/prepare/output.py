"""What is at --out already: the dataset that was asked for, or another one.

An output folder that is complete or does not exist, and what is finished of it until then.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError
from mmtrain.files import exclusive


def existing_meta(
    out: Path, source: str, settings: Mapping[str, Any], made_as: Mapping[str, Any], *, force: bool
) -> dict[str, Any] | None:
    """The meta.json of ``out`` if it was made from ``source`` with these settings; None without one, or by ``force``.

    ``made_as``: more of its keys, and what they must be (the format). Raises UserError with all that differs.
    """
    file = out / "meta.json"
    if force or not file.is_file():
        return None
    try:
        meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = {**{key: meta.get(key) for key in made_as}, "source": meta["source"], **meta["settings"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not the meta.json of a prepared dataset ({error}); give --force or another --out"
        ) from error
    wanted = {"source": source, **settings, **made_as}
    different = [f"{key} {found.get(key)!r}, not {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise UserError(f"{out}: holds a dataset made with {'; '.join(different)}; give --force or another --out")
    return meta


logger = logging.getLogger("mmtrain")


@contextmanager
def complete_or_absent(
    out: Path, *, force: bool, recipe: str = "whole", keep: bool = False, resume: bool = True
) -> Iterator[Path]:
    """A sibling of ``out`` to write into, renamed to ``out`` at the end.

    ``force`` replaces what is there, at the very end. ``recipe`` names the sibling: a process that is killed or
    interrupted leaves it behind, and the next one with the same recipe gets it back with all that is in it; those of
    other recipes are swept away. ``keep``: it stays after an error too. ``resume=False``: it is always begun anew. One
    process at a time writes ``out``.
    """
    out = out.absolute()
    if _occupied(out) and not force:
        raise UserError(f"{out}: exists and is not a finished dataset; give another --out, or --force to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    try:
        with exclusive(out.with_name(f".{out.name}.lock"), wait=False):
            if _occupied(out) and not force:
                raise UserError(f"{out}: another process has written it meanwhile; start again to check what it wrote")
            yield from _filled(out, recipe, keep, resume)
    except BlockingIOError as error:
        raise UserError(f"{out}: another process is writing it; wait for it, or give another --out") from error


def _occupied(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _filled(out: Path, recipe: str, keep: bool, resume: bool) -> Iterator[Path]:
    part = out.with_name(f".{out.name}.partial-{recipe}")
    try:
        _sweep(out, part if resume else None)
        part.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    try:
        yield part
        _replace(part, out)
    except Exception as error:
        if keep:
            _leave(part)
        else:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            # What the source cannot give is reported where it is read; what is left is the target, above all a full
            # disk.
            raise UserError(f"{out}: writing failed ({error.strerror or error})") from error
        raise
    except BaseException:  # interrupted
        _leave(part)
        raise


def _leave(part: Path) -> None:
    if any(part.rglob("*.tar")):
        logger.warning("what is finished stays in %s: the same command goes on from there", part)
    else:
        shutil.rmtree(part, ignore_errors=True)


def _replace(part: Path, out: Path) -> None:
    old = None
    if _occupied(out):
        old = out.with_name(f".{out.name}.old-{uuid.uuid4().hex}")
        out.rename(old)
    os.replace(part, out)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _sweep(out: Path, mine: Path | None) -> None:
    for left in out.parent.glob(f".{out.name}.partial-*"):
        if left != mine:
            logger.warning("%s: left by a preparation with other settings or images, removed", left)
            shutil.rmtree(left, ignore_errors=True)
