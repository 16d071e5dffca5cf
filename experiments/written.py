"""The tables that stages which predict leave: texts of items or of users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError


def table_of_texts(file: Path | str, columns: Sequence[str]) -> Any:
    """A table (polars) with at least these columns.

    Raises:
        UserError: it cannot be read, or lacks one.
    """
    import polars as pl  # a driver that only plans does without

    try:
        table = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"{file} cannot be read ({str(error).partition(chr(10))[0]}): delete its folder, and make exp "
            "makes it anew; texts that are kept are not written again"
        ) from error
    if lacks := [name for name in columns if name not in table.columns]:
        raise UserError(
            f"{file} has no column {' or '.join(lacks)}: name predictions.parquet of a stage that writes "
            "texts"
        )
    return table
