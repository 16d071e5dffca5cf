"""Instructions as data: named by content, held out by text, dealt out once over devices."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.instruction_files import COLUMNS
from datamodules.instructions import InstructionDataModule, held_out_rows
from datamodules.types import TRAIN, VALID, InstructionRows

ROWS = [{"instruction": f"Count to {i}.", "input": "", "output": "one " * i} for i in range(1, 41)]


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def made(path: Path, **options: Any) -> InstructionDataModule:
    return InstructionDataModule(str(path), cache=str(path.parent / "cache"), **options)


def frame(rows: list[tuple[str, str, str]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=list(COLUMNS), orient="row")


def test_alpaca_is_had_from_its_pinned_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datamodules.sources

    kept = write(tmp_path / "kept.json")
    asked: list[tuple[str, str | None]] = []

    def download(url: str, target: Path, checksum: str | None) -> Path:
        asked.append((url, checksum))
        shutil.copy(kept, target)
        return target

    monkeypatch.setattr(datamodules.sources, "download", download)
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    data = InstructionDataModule("alpaca", cache=str(tmp_path / "cache"))
    assert len(data.rows) == len(ROWS)
    assert data.prepared.digest == made(kept).prepared.digest  # the content counts
    ((url, _),) = asked
    assert re.fullmatch(r"https://.*/stanford_alpaca/[0-9a-f]{40}/alpaca_data\.json", url)

    def refused(url: str, target: Path, checksum: str | None) -> Path:
        raise DataSourceError("no network")

    monkeypatch.setattr(datamodules.sources, "download", refused)
    with pytest.raises(DataSourceError, match=r"(?s)no network.*instructions=FILE"):
        _ = InstructionDataModule("alpaca", cache=str(tmp_path / "other")).prepared


class Method:
    """Answers cost as many tokens as they have words, and rows above ``limit`` do not fit."""

    def __init__(self, limit: int = 1_000) -> None:
        self.limit = limit

    def target_counts(self, rows: InstructionRows) -> np.ndarray:
        words = rows.texts["output"].str.split(" ").list.len().to_numpy()[rows.row] - 1
        return np.where(words > self.limit, 0, words)

    def row_lengths(self, rows: InstructionRows) -> np.ndarray:
        return 5 + self.target_counts(rows)

    def collator(self, training: bool) -> Any:
        return lambda rows: rows


def attached(
    data: InstructionDataModule, method: Method, rank: int = 0, world: int = 1, micro: int = 1
) -> InstructionDataModule:
    trainer = SimpleNamespace(
        lightning_module=method, global_rank=rank, world_size=world, accumulate_grad_batches=micro
    )
    data.trainer = trainer  # type: ignore[assignment]
    return data


# ---------------------------------------------------------------- what names it


def test_the_content_names_it_and_not_the_place(tmp_path: Path) -> None:
    first = made(write(tmp_path / "a.json"))
    (tmp_path / "other").mkdir()
    moved = Path(shutil.copy(tmp_path / "a.json", tmp_path / "other" / "b.json"))
    second = InstructionDataModule(str(moved), cache=str(tmp_path / "cache"))
    assert second.prepared.folder == first.prepared.folder
    assert second.prepared.digest == first.prepared.digest
    changed = made(write(tmp_path / "a.json", [*ROWS[:-1], {**ROWS[-1], "output": "no"}]))
    assert changed.prepared.digest != first.prepared.digest
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps({"id": 1, **row}) for row in ROWS))
    assert made(lines).prepared.digest == first.prepared.digest  # the rows are the same
    assert made(tmp_path / "other" / "b.json", valid=0.2).prepared.digest != first.prepared.digest


def test_prepared_rows_are_the_files_rows(tmp_path: Path) -> None:
    data = made(write(tmp_path / "a.json", [*ROWS, {**ROWS[0], "output": " "}]), valid=0.1)
    assert data.rows.select(COLUMNS).to_dicts() == ROWS
    assert data.validation_rows() == 4
    assert data.remarks() == ["instructions: 36 train, 4 valid; left out: 1 blank output"]
    assert data.protocol()["content"] == data.prepared.digest


@pytest.mark.parametrize("place", [None, "/nowhere/at/all.json"])
def test_a_file_that_is_not_there_is_asked_for(place: str | None, tmp_path: Path) -> None:
    with pytest.raises(DataSourceError, match="instructions=FILE"):
        _ = InstructionDataModule(place, cache=str(tmp_path)).prepared


@pytest.mark.parametrize("options", [{"valid": 0}, {"valid": 1.0}, {"on_bad_row": "fix"}])
def test_impossible_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        InstructionDataModule("x.json", **options)


# ---------------------------------------------------------------- what is held out

SHORT = st.sampled_from(["a", "b", "c"])


@given(
    st.lists(st.tuples(SHORT, SHORT, SHORT), min_size=2, max_size=30),
    st.floats(0.01, 0.99), st.integers(0, 5), st.randoms(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_copies_go_together_and_order_does_not_matter(
    rows: list[tuple[str, str, str]], share: float, seed: int, draw: Any
) -> None:
    distinct = set(rows)
    if len(distinct) < 2:
        with pytest.raises(DataFormatError, match="one distinct row"):
            held_out_rows(frame(rows), share, seed, Path("x.json"))
        return
    held = held_out_rows(frame(rows), share, seed, Path("x.json"))
    out = {row for row, is_out in zip(rows, held, strict=True) if is_out}
    assert not out & {row for row, is_out in zip(rows, held, strict=True) if not is_out}
    assert len(out) == min(max(1, round(share * len(distinct))), len(distinct) - 1)
    order = list(range(len(rows)))
    draw.shuffle(order)
    again = held_out_rows(frame([rows[i] for i in order]), share, seed, Path("x.json"))
    assert again.tolist() == [bool(held[i]) for i in order]


def test_another_seed_holds_out_other_rows() -> None:
    table = frame([(f"i{n}", "", "o") for n in range(50)])
    first, second = (held_out_rows(table, 0.2, seed, Path("x")) for seed in (0, 1))
    assert first.sum() == second.sum() == 10
    assert (first != second).any()


# ---------------------------------------------------------------- loaders


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 1), (2, 3)])
def test_each_row_is_learned_from_once_on_any_number_of_devices(
    tmp_path: Path, world: int, micro: int
) -> None:
    path = write(tmp_path / "a.json")
    method, whole = Method(limit=30), {}
    seen: list[int] = []
    for rank in range(world):
        data = attached(made(path), method, rank, world, micro)
        data.batch_size = 16
        loader = data.train_dataloader()
        for number, rows in enumerate(loader):
            real = rows.row if rows.filler is None else rows.row[~rows.filler]
            seen += real.tolist()
            step = whole.setdefault(number // micro, [[], set()])
            step[0] += method.target_counts(InstructionRows(data.rows, real)).tolist()
            step[1].add(rows.normaliser)
    table = made(path).rows
    fits = table["output"].str.split(" ").list.len().to_numpy() - 1 <= 30
    expected = np.flatnonzero((table["split"].to_numpy() == TRAIN) & fits)
    assert sorted(seen) == expected.tolist()
    for counts, normalisers in whole.values():
        assert normalisers == {sum(counts) / (world * micro)}


def test_held_out_rows_are_validated_on_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json")
    seen = []
    for rank in range(2):
        data = attached(made(path, valid=0.3), Method(), rank, 2)
        data.batch_size = 5
        seen += [int(i) for rows in data.val_dataloader() for i in rows.row]
    assert sorted(seen) == np.flatnonzero(data.rows["split"].to_numpy() == VALID).tolist()
    assert len(seen) == 12


def test_rows_that_all_are_too_long_are_an_error(tmp_path: Path) -> None:
    data = attached(made(write(tmp_path / "a.json")), Method(limit=0))
    with pytest.raises(DataSourceError, match=r"none of 38 rows .* fits .* raise llm.max_length"):
        data.train_dataloader()
