"""Stream chosen columns of CSV and parquet files as Arrow batches, so that large files need little memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.dialect import UNNAMED
from mmtrain.data.series.files import TableFormat, dialect_of
from mmtrain.data.series.table import mark_too_large
from mmtrain.data.series.times import Reading
from mmtrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".parquet")
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Columns:
    """The columns of a panel's files by their use, and how the files are written."""

    id: str | None = None
    time: str | None = "date"  # None: no times
    targets: list[str] = field(default_factory=list)  # empty: all other columns
    known: list[str] = field(default_factory=list)
    static: list[str] = field(default_factory=list)
    form: TableFormat = field(default_factory=TableFormat)
    reading: Reading | None = None  # how the times are read

    @property
    def keys(self) -> list[str]:
        """Names of the id and the time column, if there are any."""
        return [name for name in (self.id, self.time) if name is not None]


def table_files(root: Path) -> list[Path]:
    """Return the CSV and parquet files in the folder ``root`` sorted by name, or ``root`` itself if it is such a file.

    Raises:
        UserError: if there are none.
    """
    if root.is_file() and root.suffix.lower() in SUFFIXES:
        return [root]
    found = [
        file
        for file in (sorted(root.iterdir()) if root.is_dir() else ())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    if not found:
        fault = "no such file or folder" if not root.exists() else f"no {' or '.join(SUFFIXES)} file"
        raise UserError(f"--root {root}: {fault} (looked for {root.absolute()})")
    return found


def schema_of(file: Path, form: TableFormat | None = None) -> pa.Schema:
    """Return names and types of the columns of a file.

    The types of a CSV are inferred from its first block. Empty columns without a name are left out.
    """
    with _readable(file):
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_schema(file)
        import pyarrow as pa
        from pyarrow import csv

        with csv.open_csv(file, **_csv_options(file, form)) as reader:
            named = [f for f in reader.schema if not (f.name.startswith(UNNAMED) and pa.types.is_null(f.type))]
            return pa.schema(named)


def is_number(kind: pa.DataType) -> bool:
    """Return whether a column of this type contains numbers, or only missing values."""
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)


def rows_of(file: Path) -> int:
    """Return the number of rows of a parquet file."""
    import pyarrow.parquet as pq

    with _readable(file), pq.ParquetFile(file) as parquet:
        return int(parquet.metadata.num_rows)


def batches(
    file: Path,
    names: Sequence[str],
    text: Collection[str] = (),
    rows: int = 1 << 16,
    form: TableFormat | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the columns ``names`` of a file in batches of at most ``rows`` rows (of a CSV: of a few MiB).

    Args:
        text: columns of a CSV that are read as text; all others are read as float64.

    Raises:
        UserError: if the file cannot be read, or a value is not a number.
    """
    import pyarrow as pa

    with _readable(file):
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(file) as parquet:
                yield from parquet.iter_batches(rows, columns=list(names))
            return
        from pyarrow import csv

        types = {name: pa.string() if name in text else pa.float64() for name in names}
        options = _csv_options(file, form, include_columns=list(names), column_types=types)
        with csv.open_csv(file, **options) as reader:
            yield from reader


def _csv_options(file: Path, form: TableFormat | None, **convert: Any) -> dict[str, Any]:
    """Return the options of Arrow's CSV reader for the format of ``file``."""
    from pyarrow import csv

    dialect = dialect_of(file, form)
    read: dict[str, Any] = {"block_size": _BLOCK, "encoding": dialect.encoding.replace("utf-8", "utf8")}
    if not dialect.literal:
        read |= {"column_names": list(dialect.names), "skip_rows": dialect.header_lines}
    return {
        "read_options": csv.ReadOptions(**read),
        "parse_options": csv.ParseOptions(delimiter=dialect.separator),
        "convert_options": csv.ConvertOptions(decimal_point=dialect.decimal, **convert),
    }


def numbers_of(batch: pa.RecordBatch, names: Sequence[str], file: Path) -> NDArray[np.float64]:
    """Return columns of a batch as numbers (rows, len(names)).

    Missing values become NaN. Numbers too large for float32 become infinite.

    Raises:
        UserError: for a column that is not numeric; ``file`` is named in the message.
    """
    import pyarrow as pa

    made = np.empty((batch.num_rows, len(names)))
    for number, name in enumerate(names):
        column = batch.column(name)
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            try:
                column = column.cast(pa.float64())
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise UserError(f"{file}: column {name!r} is not numeric ({error})") from None
        made[:, number] = column.to_numpy(zero_copy_only=False)
    mark_too_large(made)
    return made


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn errors of Arrow and of the system into a UserError that names ``file``."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as a table ({str(error).splitlines()[0]})") from error
