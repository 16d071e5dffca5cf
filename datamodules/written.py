"""The tables that stages which predict leave: texts of items or of users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from datamodules.errors import DataFormatError


def read_written(file: Path | str, columns: Sequence[str] = ()) -> pl.DataFrame:
    """A table with at least these columns.

    Raises:
        DataFormatError: it cannot be read, or lacks one.
    """
    try:
        table = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataFormatError(
            f"{file} cannot be read ({str(error).partition(chr(10))[0]}): delete its folder, and make exp "
            "makes it anew; texts that are kept are not written again"
        ) from error
    if lacks := [name for name in columns if name not in table.columns]:
        raise DataFormatError(
            f"{file} has no column {' or '.join(lacks)}: name predictions.parquet of a stage that writes "
            "such texts"
        )
    return table
