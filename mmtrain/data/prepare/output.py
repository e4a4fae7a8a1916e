"""The output folder of a preparation: complete, or absent; what is there already is compared with what is asked for.

An :class:`Origin` says what a data set was prepared from. A folder that was moved, or is named by another path, is the
same source: its content counts, not its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError, os_errors
from mmtrain.files import exclusive, write_atomically
from mmtrain.log import logger

FORMAT = 1  # of datasets of shards and of betons


@dataclass(frozen=True)
class Prepared:
    """The folder, its meta.json, and whether it was written now (False: it was there already)."""

    out: Path
    meta: dict[str, Any]
    fresh: bool


def check_root(root: Path, out: Path | None = None) -> None:
    """Raise UserError if there is no folder ``root``, or if it is ``out``."""
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder (looked for {root.absolute()})")
    if out is not None and out.absolute() == root.absolute():
        raise UserError(f"--out {out} is the same folder as --root")


def existing(
    out: Path,
    origin: Origin,
    settings: Mapping[str, Any],
    *,
    force: bool,
    kind: str | None = None,
    format: int = FORMAT,
) -> Prepared | None:
    """The dataset at ``out`` if it is complete and was made from ``origin`` with these settings.

    None without one, or with ``force``. ``kind`` and ``format``: what meta.json must say too. A source that lies at
    another place by now is the same one if its content is.

    Raises:
        UserError: for a dataset of another source or with other settings; it lists all that differs.
    """
    file = out / "meta.json"
    made_as = {"format": format} if kind is None else {"kind": kind, "format": format}
    if force or not file.is_file():
        return None
    try:
        meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = {**{key: meta.get(key) for key in made_as}, "source": meta["source"], **meta["settings"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: not the meta.json of a prepared dataset ({error}); give --force or another --out"
        ) from error
    wanted = {"source": origin.name, **settings, **made_as}
    other = [key for key in wanted if found.get(key) != wanted[key]]
    other = [key for key in other if key not in PATHS or not same_path(found.get(key), wanted[key])]
    moved = bool(other) and all(key in PATHS and found.get(key) is not None for key in other)
    if other and not (moved and origin.matches(meta)):
        different = "; ".join(f"{key} {found.get(key)!r}, not {wanted[key]!r}" for key in other)
        raise UserError(f"{out}: holds a dataset made with {different}; give --force or another --out")
    return Prepared(out, meta, fresh=False)


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write meta.json, durably."""
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1) + "\n", durable=True)


@contextmanager
def prepared_folder(out: Path, *, force: bool, recipe: str | None = None, keep: bool = False) -> Iterator[Path]:
    """A sibling of ``out`` to write into, renamed to ``out`` at the end.

    ``force`` replaces what is there, at the very end. ``recipe`` names the sibling: a process that is killed or
    interrupted leaves it behind, and the next one with the same recipe gets it back with all that is in it; those of
    other recipes are removed. Without a recipe it always starts empty. ``keep``: it stays after an error too. One
    process at a time writes ``out``.
    """
    out = out.absolute()
    if _occupied(out) and not force:
        raise UserError(f"{out}: exists and is not a finished dataset; give another --out, or --force to replace it")
    with os_errors(f"{out}: cannot be written", "give another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(out.with_name(f".{out.name}.lock"), wait=False):
            if _occupied(out) and not force:
                raise UserError(f"{out}: another process has written it meanwhile; start again to check what it wrote")
            yield from _filled(out, recipe, keep)
    except BlockingIOError as error:
        raise UserError(f"{out}: another process is writing it; wait for it, or give another --out") from error


def _occupied(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _filled(out: Path, recipe: str | None, keep: bool) -> Iterator[Path]:
    part = out.with_name(f".{out.name}.partial-{recipe or 'whole'}")
    with os_errors(f"{out}: cannot be written", "give another --out"):
        for left in out.parent.glob(f".{out.name}.partial-*"):
            if left != part or recipe is None:
                logger.warning("%s: left by a preparation with other settings or images, removed", left)
                shutil.rmtree(left, ignore_errors=True)
        part.mkdir(exist_ok=True)
    try:
        yield part
        old = None
        if _occupied(out):
            old = out.with_name(f".{out.name}.old-{uuid.uuid4().hex}")
            out.rename(old)
        os.replace(part, out)
        if old is not None:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    except BaseException as error:
        interrupted = not isinstance(error, Exception)
        if (keep or interrupted) and any(part.rglob("*.tar")):
            logger.warning("what is finished stays in %s: the same command goes on from there", part)
        else:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            # What the source cannot give is reported where it is read; what is left is the target, above all a full
            # disk.
            raise UserError(f"{out}: writing failed ({error.strerror or error})") from error
        raise


#: Settings that are paths. Their files count as content, too.
PATHS = ("source", "calendar", "val_labels")
#: Files that are read whole for a digest, together; of more only the ends of some are read.
_READ, _SOME, _END = 256 << 20, 64, 64 << 10


@dataclass(frozen=True)
class Origin:
    """``name``: as meta.json has it. ``paths``: the files and folders that it stands for, none for made-up data."""

    name: str
    paths: tuple[Path, ...] = ()

    @classmethod
    def of(cls, *paths: str | Path | None) -> Origin:
        """The first path is the one that is named; of the others only the content counts."""
        given = tuple(Path(os.path.realpath(Path(path).expanduser())) for path in paths if path is not None)
        return cls(str(given[0]), given)

    def to_meta(self) -> dict[str, Any]:
        """The part of meta.json that :meth:`matches` looks at."""
        return {"source": self.name, **({"content": self.content()} if self.paths else {})}

    def matches(self, meta: Mapping[str, Any]) -> bool:
        """Whether ``meta`` is of a dataset with this content. One of version 0.1.0 does not say what its content is."""
        return bool(self.paths) and meta.get("content") == self.content()

    def content(self) -> str:
        """A digest of the names below the paths and the sizes of the files, and of what is in the files.

        All is read where that is little; else the beginnings and the ends of some files spread over all of them. Hidden
        files and the indexes of shards are left out.

        Raises:
            UserError: for files that cannot be read.
        """
        digest = hashlib.blake2b(digest_size=16)
        with os_errors(f"{self.name}: cannot be read"):
            found = [(number, *entry) for number, path in enumerate(self.paths) for entry in _files(path)]
            for number, name, _, size in found:
                digest.update(f"{number} {name!r} {size}\n".encode("utf-8", "surrogateescape"))
            whole = sum(entry[3] for entry in found) <= _READ
            for *_, file, size in found if whole else found[:: -(-len(found) // _SOME)]:
                with open(file, "rb") as stream:
                    if whole:
                        digest.update(hashlib.file_digest(stream, "blake2b").digest())
                    else:
                        digest.update(stream.read(_END))
                        stream.seek(max(0, size - _END))
                        digest.update(stream.read(_END))
        return digest.hexdigest()


def same_path(one: Any, other: Any) -> bool:
    """Whether two values of meta.json name the same place; a source may be several paths (", " and "; ")."""
    return isinstance(one, str) and isinstance(other, str) and _real(one) == _real(other)


def _real(name: str) -> list[list[str]]:
    return [[os.path.realpath(path) for path in part.split(", ")] for part in name.split("; ")]


def _files(path: Path) -> Iterator[tuple[str, Path, int]]:
    """Name below ``path``, path and size of each file, in the order of the names."""
    if not path.is_dir():
        yield "", path, path.stat().st_size
        return
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and file.suffix != ".idx" and file.is_file():
                yield file.relative_to(path).as_posix(), file, file.stat().st_size
