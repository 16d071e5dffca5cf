"""``InstructionDataModule``: instructions with their answers, which a language model is tuned on first.

Legend: R rows, B rows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from torch.utils.data import DataLoader, Dataset

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.instruction_files import COLUMNS, read_instructions
from datamodules.prepared import Prepared
from datamodules.samplers import RowBatch
from datamodules.sources import Download, file_digest, first_available
from datamodules.stage_data import StageDataModule
from datamodules.types import TRAIN, VALID, InstructionMethod, InstructionRows, TokenBatch
from datamodules.versioning import (
    package_digest,
    publish_folder,
    value_digest,
    write_json,
)

ROWS = "rows.parquet"
# Taori et al., "Stanford Alpaca", 2023: 52,002 rows, CC BY-NC 4.0.
ALPACA = Download(
    "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/"
    "alpaca_data.json",
    ("alpaca_data.json",),
)
_REMEDY = (
    'download it where there is a network and pass ARGS="instructions=FILE", or any other file in the format '
    "of Alpaca"
)


class InstructionDataModule(StageDataModule):
    """Rows of a file in Alpaca's format (``instruction_files``), some of them held out.

    Args:
        instructions: the file; its content counts, not its place. ``alpaca`` is Alpaca's own, which is
            downloaded.
        valid: share of the distinct rows that is held out to select an epoch on; at least one row is. Which
            ones follows from their text and ``valid_seed``, so that copies of a row are never on both sides.
        valid_seed: draws them.
        on_bad_row: ``error`` stops at the first row that is not in the format; ``skip`` counts such rows.
        name: names the data in folders and tables.
        cache: as in ``StageDataModule``.

    Raises:
        ValueError: impossible arguments.
        DataSourceError: on preparing, there is no such file.
        DataFormatError: on preparing, the file is not in the format, or too short to hold anything out.
    """

    def __init__(
        self,
        instructions: str | None,
        valid: float = 0.05,
        valid_seed: int = 0,
        on_bad_row: str = "error",
        name: str = "instructions",
        cache: str | None = None,
    ) -> None:
        super().__init__(name, cache)
        if not 0 < valid < 1:
            raise ValueError(f"valid is {valid!r}, expected a share above 0 and below 1")
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}, expected 'error' or 'skip'")
        self.instructions = instructions
        self.valid, self.valid_seed, self.on_bad_row = valid, valid_seed, on_bad_row

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared folder, made on first use."""
        if self.instructions is None:
            raise DataSourceError(
                'there is no file of instructions: pass ARGS="instructions=FILE", a JSON list or JSON lines '
                f"of {', '.join(COLUMNS)} (Alpaca's format), or instructions=alpaca (CC BY-NC 4.0)."
            )
        path = self._file(self.instructions)
        asked = {
            "sha256": file_digest(path), "valid": self.valid, "valid_seed": self.valid_seed,
            "on_bad_row": self.on_bad_row, "code": package_digest(),
        }  # fmt: skip
        folder = self.cache / "prepared" / f"{self.name}-{value_digest(asked)}"
        if not (folder / "manifest.json").is_file():
            publish_folder(folder, "manifest.json", lambda part: self._write(part, path))
        return Prepared(folder)

    def _file(self, named: str) -> Path:
        if named == "alpaca":
            found, _ = first_available([ALPACA], self.cache, "Alpaca's instructions", _REMEDY)
            return found["alpaca_data.json"]
        path = Path(named).expanduser()
        if not path.is_file():
            raise DataSourceError(f"{path} is not a file: pass instructions=FILE, its whole path.")
        return path

    def _write(self, folder: Path, path: Path) -> None:
        frame, left_out, digest = read_instructions(path, self.on_bad_row)
        held_out = held_out_rows(frame, self.valid, self.valid_seed, path)
        frame = frame.with_columns(split=pl.Series(np.where(held_out, VALID, TRAIN), dtype=pl.Int8))
        frame.write_parquet(folder / ROWS)
        recipe = {"name": self.name, "valid": self.valid, "valid_seed": self.valid_seed}
        counts = {"train": int((~held_out).sum()), "valid": int(held_out.sum())}
        manifest = {
            "recipe": {**recipe, "left out": [f"{n:,} {reason}" for reason, n in left_out.items()]},
            "source": path.name,
            "checksums": {path.name: digest},
            "counts": counts,
            "digest": value_digest([frame.rows(), recipe], 16),
        }
        write_json(folder / "manifest.json", manifest)

    @cached_property
    def rows(self) -> pl.DataFrame:
        """``COLUMNS`` and ``split`` (TRAIN or VALID), in the file's order (R,)."""
        return self.prepared.parquet(ROWS)

    def protocol(self) -> dict[str, Any]:
        """The file's content and what is held out."""
        return {**self.prepared.protocol, "content": self.prepared.digest}

    def validation_rows(self) -> int:
        """Held-out rows."""
        return int(self.prepared.manifest["counts"]["valid"])

    def remarks(self) -> list[str]:
        """Counts, and what was left out."""
        manifest = self.prepared.manifest
        parts = [f"{count:,} {split}" for split, count in manifest["counts"].items()]
        left_out = ", ".join(manifest["recipe"]["left out"]) or "none"
        return [f"instructions: {', '.join(parts)}; left out: {left_out}"]

    def train_dataloader(self) -> DataLoader[TokenBatch]:
        """Global batches, the same on every number of devices; micro batches hold rows of like lengths.

        The batches themselves hold rows of any length: a row has a loss at every token of its answer, and a
        batch of short answers would weigh as much as one of long ones.
        """
        method = self._method()
        asked, counts = self._learnable(TRAIN)
        sampler = self._train_batches(method.row_lengths(asked), counts)
        return self._loader(_Chosen(self.rows, asked.row), sampler, method.collator(training=True))

    def val_dataloader(self) -> DataLoader[TokenBatch]:
        """Held-out rows, each exactly once over all devices."""
        method = self._method()
        asked, _ = self._learnable(VALID)
        sampler = self._eval_batches(method.row_lengths(asked))
        return self._loader(_Chosen(self.rows, asked.row), sampler, method.collator(training=False))

    def _learnable(self, code: int) -> tuple[InstructionRows, np.ndarray]:
        """The rows of a split that the method can learn from, and (R,) tokens of each that carry a loss."""
        method = self._method()
        every = InstructionRows(self.rows, np.flatnonzero(self.rows["split"].to_numpy() == code))
        counts = method.target_counts(every)  # (R,)
        if not (counts > 0).any():
            raise DataSourceError(
                f"none of {len(counts)} rows of {self.name} fits into the language model's max_length: "
                "raise llm.max_length, or take a file of shorter instructions."
            )
        return InstructionRows(self.rows, every.row[counts > 0]), counts[counts > 0]

    def _method(self) -> InstructionMethod:
        module: Any = self._trainer().lightning_module
        return module


class _Chosen(Dataset[InstructionRows]):
    """Hands a sampler's batch of row numbers on as ``InstructionRows``."""

    def __init__(self, texts: pl.DataFrame, rows: np.ndarray) -> None:
        self.texts, self.rows = texts, rows

    def __getitem__(self, batch: RowBatch) -> InstructionRows:
        return InstructionRows(self.texts, self.rows[batch.row], batch.filler, batch.normaliser)


def held_out_rows(frame: pl.DataFrame, share: float, seed: int, path: Path) -> np.ndarray:
    """(R,) bool: which rows are held out, by their text and ``seed`` alone; copies go together.

    Raises:
        DataFormatError: there is only one distinct row.
    """
    keys = [_key(row, seed) for row in frame.select(COLUMNS).iter_rows()]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise DataFormatError(
            f"{path}: one distinct row cannot be both learned from and held out; give a longer file."
        )
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    chosen = set(distinct[:count])
    return np.array([key in chosen for key in keys])


def _key(row: Sequence[str], seed: int) -> bytes:
    text = "\0".join([str(seed), *row])
    return hashlib.sha256(text.encode()).digest()
