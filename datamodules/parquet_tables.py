"""Parquet files of unknown origin, read without trust.

A damaged file may ask Polars for more memory than there is, which ends the process without an
exception. So another process reads it first; only what that one could read is read here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from datamodules.errors import DataFormatError

_TRY = "import sys, polars; polars.read_parquet(sys.argv[1], glob=False)"


def columns_of(path: Path) -> dict[str, pl.DataType]:
    """Names and types. Raises DataFormatError for a file that cannot be read to its end."""
    done = subprocess.run(
        [sys.executable, "-c", _TRY, str(path)], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataFormatError(
            f"{path}: the file is no Parquet file or is damaged ({last[:200]}); write it again."
        )
    return dict(pl.read_parquet_schema(path))


def read_columns(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Some columns of a file that ``columns_of`` found sound."""
    return pl.read_parquet(path, columns=list(columns), glob=False)
