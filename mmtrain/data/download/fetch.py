"""Fetching a public table to a checked file under the data root. The file is complete or absent."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mmtrain.data.download.check import Checked, check_table, file_sha256, table_to_csv
from mmtrain.data.download.http import Patience, discard, download
from mmtrain.data.download.registry import Dataset, Source
from mmtrain.errors import UserError, os_errors
from mmtrain.files import exclusive, sync, write_atomically
from mmtrain.log import logger


@dataclass(frozen=True)
class Fetched:
    """A table under the data root, and how it was obtained."""

    checked: Checked
    origin: str  # URL or file from which it was fetched; "" if the table existed already
    known: bool  # True: its SHA-256 was compared with the one stored when it was first fetched

    @property
    def path(self) -> Path:
        return self.checked.path


def data_root(given: str | Path | None = None) -> Path:
    """Return the data root: ``given``, or $MMTRAIN_DATA, or ``data``."""
    return Path(given or os.environ.get("MMTRAIN_DATA") or "data").expanduser()


def get_dataset(
    dataset: Dataset,
    root: Path,
    *,
    force: bool = False,
    from_file: Path | None = None,
    patience: Patience | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Fetched:
    """Return the table STEM.csv (or .parquet) under ``root``. If it does not exist, fetch and check it.

    The URLs of the table are tried in order. STEM.csv.sha256 stores the SHA-256 of the first fetch, and a file with a
    different SHA-256 is rejected. If several processes request the same table at once, only one of them fetches it.

    Args:
        force: fetch the table even if it exists.
        from_file: copy the table from this file instead of a URL.
        patience: timeouts and retries.
        progress: callback ``progress(bytes received, total bytes or None)``.

    Raises:
        UserError: if the table cannot be fetched or fails a check. An existing table is then unchanged.
    """
    with os_errors(f"{root}: cannot be written", "give another --data-root"):
        root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f".{dataset.stem}.lock", wait=True):
        if not force and from_file is None and (existing := _existing(dataset, root)) is not None:
            return _keep(check_table(existing, dataset), "")
        sources = dataset.sources
        if from_file is not None:
            if not from_file.is_file():
                raise UserError(f"--from-file {from_file}: no such file")
            sources = (Source(str(from_file), "table.gz" if from_file.suffix == ".gz" else "csv"),)
        faults = []
        for source in sources:
            try:
                return _from(source, dataset, root / f"{dataset.stem}.csv", from_file, patience, progress)
            except UserError as error:
                faults.append(str(error))
                if source is not sources[-1]:
                    logger.warning("%s; trying the next URL", error)
    if from_file is not None:
        raise UserError(faults[0])
    raise UserError("\n  ".join([f"{dataset.name} could not be fetched:", *faults, _by_hand(dataset, root)]))


def verify_dataset(dataset: Dataset, root: Path) -> Fetched:
    """Check the existing table under ``root``, without network access. Raises UserError if it is missing or wrong."""
    existing = _existing(dataset, root)
    if existing is None:
        raise UserError(
            f"{root / dataset.stem}.csv or .parquet: no such file. Fetch it with `mmtrain data get {dataset.name}`"
        )
    return _keep(check_table(existing, dataset), "")


def _existing(dataset: Dataset, root: Path) -> Path | None:
    names = (root / f"{dataset.stem}{suffix}" for suffix in (".csv", ".parquet"))
    return next((path for path in names if path.is_file()), None)


def _from(
    source: Source,
    dataset: Dataset,
    final: Path,
    local: Path | None,
    patience: Patience | None,
    progress: Callable[[int, int | None], None] | None,
) -> Fetched:
    part, made = final.with_name(f"{final.name}.part"), final.with_name(f".{final.name}.new.csv")
    if local is None:
        download(source.url, part, limit=source.limit, patience=patience, progress=progress)
    raw = local or part
    again = "run the command again" if local is None else "give another file with --from-file"
    try:
        size = raw.stat().st_size
        if source.size is not None and size != source.size:
            raise UserError(f"{raw.name}: has {size} bytes instead of {source.size}; {again}")
        if source.sha256 is not None and (found := file_sha256(raw)) != source.sha256:
            raise UserError(f"{raw.name}: its SHA-256 is {found} instead of {source.sha256}; {again}")
        if source.form == "table.gz":
            table_to_csv(raw, made, dataset)
        elif local is None:
            os.replace(raw, made)
        else:
            shutil.copyfile(raw, made)
            sync(made)
        checked = check_table(made, dataset)
        _same_as_before(final, checked.sha256)
        os.replace(made, final)
        sync(final.parent)
        discard(part)
    except UserError as error:
        if local is None:
            discard(part)  # the download is complete but wrong, so it must not be resumed
        raise UserError(f"{source.url}: {str(error).replace(str(made), raw.name)}") from error
    except OSError as error:
        raise UserError(f"{final}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            made.unlink()
    return _keep(replace(checked, path=final), source.url)


def _keep(checked: Checked, origin: str) -> Fetched:
    known = _same_as_before(checked.path, checked.sha256)
    if not known:
        note = _note(checked.path)
        try:
            write_atomically(note, f"{checked.sha256}  {checked.path.name}\n")  # in the format of sha256sum -c
        except OSError as error:
            logger.warning(
                "%s: cannot be written (%s), so later calls cannot detect changes of the table", note, error.strerror
            )
    return Fetched(checked, origin, known)


def _same_as_before(path: Path, sha256: str) -> bool:
    """Return whether a SHA-256 is stored for ``path``. Raises UserError if it differs from ``sha256``."""
    note = _note(path)
    try:
        text = note.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{note}: cannot be read ({error}). Delete it to store a new SHA-256") from error
    before = re.match(r"[0-9a-fA-F]{64}\b", text)
    if before is None:
        raise UserError(f"{note}: does not begin with a SHA-256. Delete it to store a new one")
    if before[0].lower() != sha256:
        raise UserError(
            f"{path}: its SHA-256 is {sha256}, but was {before[0].lower()} at the first fetch ({note.name}). Find out "
            f"why the file changed, or delete {note} to accept the new file"
        )
    return True


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _by_hand(dataset: Dataset, root: Path) -> str:
    text = (
        f"To add it manually, copy the benchmark's {dataset.stem}.csv (or .parquet) to {root.absolute()} and run "
        f"`mmtrain data get {dataset.name} --verify`"
    )
    if dataset.sources[0].form == "table.gz":
        text += f"; or download the first URL elsewhere and run `mmtrain data get {dataset.name} --from-file FILE`"
    return text
