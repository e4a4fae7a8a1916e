"""From an address to a checked file under the data root, which is there whole or not at all."""

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
    checked: Checked
    origin: str  # address or file; "" if the table was there already
    known: bool  # its SHA-256 was compared with the one kept from the first time

    @property
    def path(self) -> Path:
        return self.checked.path


def data_root(given: str | Path | None = None) -> Path:
    """``given``, else $MMTRAIN_DATA, else ``data``."""
    return Path(given or os.environ.get("MMTRAIN_DATA") or "data").expanduser()


def get_dataset(
    dataset: Dataset,
    root: Path,
    *,
    force: bool = False,
    from_file: Path | None = None,
    patience: Patience | None = None,
    told: Callable[[int, int | None], None] | None = None,
) -> Fetched:
    """The table under ``root`` as STEM.csv: the one that is there (CSV or parquet), else fetched and checked.

    Sources are tried in order. ``from_file``: take this file, fetched by other means, instead. ``force``: fetch again.
    STEM.csv.sha256 keeps the SHA-256 of the first time; a file with another one is refused. Several processes may ask
    for the same table at once: one fetches it. Raises UserError, and then nothing has changed under the final name.
    """
    with os_errors(f"{root}: cannot be written", "give another --data-root"):
        root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f".{dataset.stem}.lock", wait=True):
        if not force and from_file is None and (there := _there(dataset, root)) is not None:
            return _keep(check_table(there, dataset), "")
        sources = dataset.sources
        if from_file is not None:
            if not from_file.is_file():
                raise UserError(f"--from-file {from_file}: no such file")
            sources = (Source(str(from_file), "table.gz" if from_file.suffix == ".gz" else "csv"),)
        faults = []
        for source in sources:
            try:
                return _from(source, dataset, root / f"{dataset.stem}.csv", from_file, patience, told)
            except UserError as error:
                faults.append(str(error))
                if source is not sources[-1]:
                    logger.warning("%s; trying the next address", error)
    if from_file is not None:
        raise UserError(faults[0])
    raise UserError("\n  ".join([f"{dataset.name} could not be fetched:", *faults, _by_hand(dataset, root)]))


def verify_dataset(dataset: Dataset, root: Path) -> Fetched:
    """Check the table that is under ``root``, without a network."""
    there = _there(dataset, root)
    if there is None:
        raise UserError(f"{root / dataset.stem}.csv or .parquet: not there; mmtrain data get {dataset.name} fetches it")
    return _keep(check_table(there, dataset), "")


def _there(dataset: Dataset, root: Path) -> Path | None:
    names = (root / f"{dataset.stem}{suffix}" for suffix in (".csv", ".parquet"))
    return next((path for path in names if path.is_file()), None)


def _from(
    source: Source,
    dataset: Dataset,
    final: Path,
    local: Path | None,
    patience: Patience | None,
    told: Callable[[int, int | None], None] | None,
) -> Fetched:
    part, made = final.with_name(f"{final.name}.part"), final.with_name(f".{final.name}.new.csv")
    if local is None:
        download(source.url, part, limit=source.limit, patience=patience, told=told)
    raw = local or part
    try:
        size = raw.stat().st_size
        if source.size is not None and size != source.size:
            raise UserError(f"{raw.name}: {size} bytes, not {source.size}")
        if source.sha256 is not None and (found := file_sha256(raw)) != source.sha256:
            raise UserError(f"{raw.name}: its SHA-256 is {found}, not {source.sha256}")
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
            discard(part)  # whole and wrong: there is nothing to continue
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
            write_atomically(note, f"{checked.sha256}  {checked.path.name}\n")  # as sha256sum -c reads it
        except OSError as error:
            logger.warning(
                "%s: cannot be written (%s): the next call has nothing to compare with", note, error.strerror
            )
    return Fetched(checked, origin, known)


def _same_as_before(path: Path, sha256: str) -> bool:
    """Whether a SHA-256 was kept for ``path``; raises UserError if it is another one."""
    note = _note(path)
    try:
        text = note.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{note}: cannot be read ({error}); delete it to start anew") from error
    before = re.match(r"[0-9a-fA-F]{64}\b", text)
    if before is None:
        raise UserError(f"{note}: does not begin with a SHA-256; delete it to start anew")
    if before[0].lower() != sha256:
        raise UserError(
            f"{path}: its SHA-256 is {sha256}, but it was {before[0].lower()} the first time ({note.name}); find out "
            f"why, or delete {note} to accept the new one"
        )
    return True


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _by_hand(dataset: Dataset, root: Path) -> str:
    text = (
        f"By hand: put the benchmark's {dataset.stem}.csv (or .parquet) into {root.absolute()} and call mmtrain data "
        f"get {dataset.name} --verify"
    )
    if dataset.sources[0].form == "table.gz":
        text += f"; or fetch the first address elsewhere and call mmtrain data get {dataset.name} --from-file FILE"
    return text
