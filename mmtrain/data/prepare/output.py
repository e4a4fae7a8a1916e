"""Output folders of prepared datasets. A folder is either complete or absent.

An existing dataset is reused if it has the requested source and settings. An :class:`Origin` identifies the source by
its content, so a source that was moved or is named by another path is still the same.
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

FORMAT = 1  # format version of datasets of shards and of betons


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset."""

    out: Path  # its folder
    meta: dict[str, Any]  # content of its meta.json
    fresh: bool  # whether it was written by this call; False: it existed before


def check_root(root: Path, out: Path | None = None) -> None:
    """Raise UserError if the folder ``root`` does not exist, or if ``out`` is the same folder."""
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder (looked for {root.absolute()})")
    if out is not None and out.absolute() == root.absolute():
        raise UserError(f"--out {out}: is the same folder as --root; give another --out")


def existing(
    out: Path,
    origin: Origin,
    settings: Mapping[str, Any],
    *,
    force: bool,
    kind: str | None = None,
    format: int = FORMAT,
) -> Prepared | None:
    """Return the dataset at ``out`` if it is complete and was prepared from ``origin`` with these settings.

    A source that has been moved is the same source if its content is the same.

    Args:
        force: return None in any case, so that ``out`` is written again.
        kind, format: values that meta.json must have in addition to the settings.

    Returns:
        The dataset, or None if ``out`` has to be prepared.

    Raises:
        UserError: if the dataset has another source or other settings; the message lists all differences.
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
            f"{file}: not the meta.json of a prepared dataset ({error}); give --force to replace it, or another --out"
        ) from error
    wanted = {"source": origin.name, **settings, **made_as}
    other = [key for key in wanted if found.get(key) != wanted[key]]
    other = [key for key in other if key not in PATHS or not same_path(found.get(key), wanted[key])]
    moved = bool(other) and all(key in PATHS and found.get(key) is not None for key in other)
    if other and not (moved and origin.matches(meta)):
        different = "; ".join(f"{key} {found.get(key)!r}, not {wanted[key]!r}" for key in other)
        raise UserError(
            f"{out}: contains a dataset prepared with {different}; give --force to replace it, or another --out"
        )
    return Prepared(out, meta, fresh=False)


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write meta.json and flush it to disk."""
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1) + "\n", durable=True)


@contextmanager
def prepared_folder(out: Path, *, force: bool, recipe: str | None = None, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to ``out`` to write into; rename it to ``out`` at the end.

    Only one process at a time can write ``out``.

    Args:
        force: replace an existing ``out``, after everything is written.
        recipe: name of the temporary folder. A killed or interrupted process leaves the folder behind, and the next
            one with the same recipe continues in it. Folders of other recipes are removed. None: start empty.
        keep: also leave the folder behind after an error.

    Raises:
        UserError: if ``out`` exists and ``force`` is false, if another process is writing it, or if writing fails.
    """
    out = out.absolute()
    if _occupied(out) and not force:
        raise UserError(f"{out}: exists and is not a finished dataset; give another --out, or --force to replace it")
    with os_errors(f"{out}: cannot be written", "give another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(out.with_name(f".{out.name}.lock"), wait=False):
            if _occupied(out) and not force:
                raise UserError(f"{out}: another process has just written it; run the command again to check it")
            yield from _filled(out, recipe, keep)
    except BlockingIOError as error:
        raise UserError(f"{out}: another process is writing it; wait until it ends, or give another --out") from error


def _occupied(out: Path) -> bool:
    """Return whether ``out`` is a file or a folder that is not empty."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _filled(out: Path, recipe: str | None, keep: bool) -> Iterator[Path]:
    """Yield the temporary folder and move it to ``out``; see :func:`prepared_folder`."""
    part = out.with_name(f".{out.name}.partial-{recipe or 'whole'}")
    with os_errors(f"{out}: cannot be written", "give another --out"):
        for left in out.parent.glob(f".{out.name}.partial-*"):
            if left != part or recipe is None:
                logger.warning("%s: removed; it was left by a preparation with other settings or files", left)
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
            logger.warning("finished shards are kept in %s; the same command resumes from them", part)
        else:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            # Errors of the source are reported where it is read, so this one is of the target, often a full disk.
            cause = error.strerror or error
            raise UserError(f"{out}: writing failed ({cause}); check the disk, or give another --out") from error
        raise


#: Settings that are paths. Their files are part of the content of the source.
PATHS = ("source", "calendar", "val_labels")
#: Sources up to ``_READ`` bytes are digested whole; of larger ones, ``_END`` bytes of both ends of ``_SOME`` files.
_READ, _SOME, _END = 256 << 20, 64, 64 << 10


@dataclass(frozen=True)
class Origin:
    """The source of a prepared dataset."""

    name: str  # as written to meta.json
    paths: tuple[Path, ...] = ()  # its files and folders; none for synthetic data

    @classmethod
    def of(cls, *paths: str | Path | None) -> Origin:
        """Build the origin from paths. The first one gives the name; the others count only by their content."""
        given = tuple(Path(os.path.realpath(Path(path).expanduser())) for path in paths if path is not None)
        return cls(str(given[0]), given)

    def to_meta(self) -> dict[str, Any]:
        """Return the entries of meta.json that :meth:`matches` compares."""
        return {"source": self.name, **({"content": self.content()} if self.paths else {})}

    def matches(self, meta: Mapping[str, Any]) -> bool:
        """Return whether the dataset of ``meta`` has this content. False for version 0.1.0, which recorded none."""
        return bool(self.paths) and meta.get("content") == self.content()

    def content(self) -> str:
        """Return a digest of the names, sizes and content of all files in the paths.

        Small sources are read completely. For large ones the starts and ends of some evenly spread files are read.
        Hidden files and the indexes of shards are ignored.

        Raises:
            UserError: if a file cannot be read.
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
    """Return whether two values of meta.json name the same paths; a source may be several, joined by ", " and "; "."""
    return isinstance(one, str) and isinstance(other, str) and _real(one) == _real(other)


def _real(name: str) -> list[list[str]]:
    return [[os.path.realpath(path) for path in part.split(", ")] for part in name.split("; ")]


def _files(path: Path) -> Iterator[tuple[str, Path, int]]:
    """Yield the name relative to ``path``, the path and the size of each file, sorted by folder and name."""
    if not path.is_dir():
        yield "", path, path.stat().st_size
        return
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and file.suffix != ".idx" and file.is_file():
                yield file.relative_to(path).as_posix(), file, file.stat().st_size
