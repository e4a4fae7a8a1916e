"""Registry of the public tables for ``mmtrain data get``: URLs, licences and expected content.

``sha256`` and ``size`` describe the file at a URL. If they are None (unknown), only the content is checked. The values
for ETT are the ones that the package tsdm (``tsdm.datasets.ett``) uses for the same URLs. ``digest`` is the digest of
values and timestamps (see ``mmtrain.data.download.check`` and ``mmtrain data digest FILE``), which is the same for a
CSV and a parquet file.

The mirrors are the copies published by the authors of the benchmark's library (thuml/Time-Series-Library).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmtrain.errors import UserError, nearest

MINUTE, HOUR, DAY = 60, 3600, 86400
MIB = 1 << 20

_ETT = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
_LAI = "https://raw.githubusercontent.com/laiguokun/multivariate-time-series-data/master/"
_THUML = "https://huggingface.co/datasets/thuml/Time-Series-Library/resolve/main/"
_ETT_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
_LSTNET = "Lai et al. 2018, Modeling Long- and Short-Term Temporal Patterns with Deep Neural Networks (LSTNet)"
_INFORMER = "Zhou et al. 2021, Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting"


@dataclass(frozen=True)
class Source:
    """One URL of a table."""

    url: str
    form: Literal["csv", "table.gz"] = "csv"  # csv: with header and timestamps; table.gz: bare numbers, gzip-compressed
    sha256: str | None = None  # of the file
    size: int | None = None  # of the file, in bytes
    limit: int = 64 * MIB  # maximum size of the download, in bytes


@dataclass(frozen=True)
class Dataset:
    """One public table."""

    name: str  # as in ``mmtrain data get NAME``
    stem: str  # file name without suffix, as in configurations
    rows: int
    columns: tuple[str, ...]  # without ``date``
    first: str  # first timestamp
    last: str  # last timestamp
    step: int  # time step, in seconds
    sources: tuple[Source, ...]  # tried in order
    licence: str
    citation: str
    digest: str | None = None  # of the content
    irregular: int = 0  # number of time steps of the official file that differ from ``step``
    note: str = ""


def _numbered(count: int) -> tuple[str, ...]:
    """Return the benchmark's column names of tables without a header: 0, 1, ..., and OT for the last column."""
    return (*(str(number) for number in range(count - 1)), "OT")


def _ett(stem: str, sha256: str, digest: str) -> Dataset:
    hourly = stem.startswith("ETTh")
    return Dataset(
        stem.lower(),
        stem,
        17420 if hourly else 69680,
        _ETT_COLUMNS,
        "2016-07-01 00:00:00",
        "2018-06-26 19:00:00" if hourly else "2018-06-26 19:45:00",
        HOUR if hourly else 15 * MINUTE,
        (Source(f"{_ETT}{stem}.csv", sha256=sha256), Source(f"{_THUML}ETT-small/{stem}.csv")),
        "CC BY-ND 4.0",
        _INFORMER,
        digest,
    )


def _wide(name: str, rows: int, columns: int, last: str, license: str, measured: str) -> Dataset:
    sources = (
        Source(f"{_LAI}{name}/{name}.txt.gz", "table.gz", limit=256 * MIB),
        Source(f"{_THUML}{name}/{name}.csv", limit=512 * MIB),
    )
    first, note = "2016-07-01 02:00:00", f"the timestamps are the benchmark's; the data was measured in {measured}"
    return Dataset(name, name, rows, _numbered(columns), first, last, HOUR, sources, license, _LSTNET, note=note)


_DATASETS = (
    _ett(
        "ETTh1",
        "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
        "08ee3c79f2d74cd782cef997238da90e8ef3486a53044d5d6246c7fd3ee27075",
    ),
    _ett(
        "ETTh2",
        "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
        "af8ab5a823df7f720aee6d92f0004444efddf63d9db2e41b85862331f418cc0a",
    ),
    _ett(
        "ETTm1",
        "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
        "4ca98c9dff4de09b2a564f419a464d1da07c478e643b05e9637aa473bc9994d8",
    ),
    _ett(
        "ETTm2",
        "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
        "53a401e373baa981bb328484f63c06f4a12960369cce8557632f0b7b2cb49a7e",
    ),
    Dataset(
        "weather",
        "weather",
        52696,
        (
            *("p (mbar)", "T (degC)", "Tpot (K)", "Tdew (degC)", "rh (%)", "VPmax (mbar)", "VPact (mbar)"),
            *("VPdef (mbar)", "sh (g/kg)", "H2OC (mmol/mol)", "rho (g/m**3)", "wv (m/s)", "max. wv (m/s)"),
            *("wd (deg)", "rain (mm)", "raining (s)", "SWDR (W/m²)", "PAR (µmol/m²/s)", "max. PAR (µmol/m²/s)"),
            *("Tlog (degC)", "OT"),
        ),
        "2020-01-01 00:10:00",
        "2021-01-01 00:00:00",
        10 * MINUTE,
        (Source(f"{_THUML}weather/weather.csv"),),
        "none stated (Max Planck Institute for Biogeochemistry, Jena)",
        "Wu et al. 2021, Autoformer: Decomposition Transformers with Auto-Correlation; station: bgc-jena.mpg.de/wetter",
        irregular=2,
        note="-9999 means a missing value in wv, max. PAR and OT, as in the published benchmark",
    ),
    _wide(
        "electricity",
        26304,
        321,
        "2019-07-02 01:00:00",
        "CC BY 4.0 (UCI ElectricityLoadDiagrams20112014)",
        "2012 to 2014",
    ),
    _wide(
        "traffic",
        17544,
        862,
        "2018-07-02 01:00:00",
        "none stated (California Department of Transportation, PeMS)",
        "2015 and 2016",
    ),
    Dataset(
        "exchange",
        "exchange_rate",
        7588,
        _numbered(8),
        "1990-01-01 00:00:00",
        "2010-10-10 00:00:00",
        DAY,
        (
            Source(f"{_LAI}exchange_rate/exchange_rate.txt.gz", "table.gz"),
            Source(f"{_THUML}exchange_rate/exchange_rate.csv"),
        ),
        "none stated",
        _LSTNET,
        "0baf076a3cb76f16b5a32a9ea8834011dfd5baf586e854271c769a134360d7a3",
        note="the timestamps are the benchmark's; there are no rates on weekends, so the real dates end later",
    ),
    Dataset(
        "ili",
        "national_illness",
        966,
        ("% WEIGHTED ILI", "%UNWEIGHTED ILI", "AGE 0-4", "AGE 5-24", "ILITOTAL", "NUM. OF PROVIDERS", "OT"),
        "2002-01-01 00:00:00",
        "2020-06-30 00:00:00",
        7 * DAY,
        (Source(f"{_THUML}illness/national_illness.csv"),),
        "none stated (Centers for Disease Control and Prevention, FluView)",
        "Wu et al. 2021, Autoformer; data: gis.cdc.gov/grasp/fluview",
    ),
    Dataset(
        "solar",
        "solar_AL",
        52560,
        _numbered(137),
        "2006-01-01 00:00:00",
        "2006-12-31 23:50:00",
        10 * MINUTE,
        (Source(f"{_LAI}solar-energy/solar_AL.txt.gz", "table.gz", limit=256 * MIB),),
        "none stated (National Renewable Energy Laboratory)",
        _LSTNET,
    ),
)
DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _DATASETS}


def find_dataset(name: str) -> Dataset:
    """Return the table with a given name or file name, for example ETTh1, exchange_rate or weather.csv.

    Upper and lower case are equivalent. Raises UserError for an unknown name.
    """
    wanted = name.lower().removesuffix(".csv").removesuffix(".parquet")
    for dataset in DATASETS.values():
        if wanted in (dataset.name, dataset.stem.lower()):
            return dataset
    raise UserError(f"{name}: no such data set{nearest(wanted, DATASETS) or '.'} Available: {', '.join(DATASETS)}")
