"""Scored candidates of two models, read from the files that their tests wrote (``callbacks.scores``).

Legend: R rows, C candidates.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KEYS = ("row", "user_id", "item_id", "is_target")
# What rows were scored, and which of them: two splits of one protocol differ in nothing else.
_ROWS = ("scored", "test_rows")


@dataclass(frozen=True)
class ScoredPair:
    """The same rows as two models scored them; items ascend in each row, padding (0) behind them."""

    row: NDArray[np.int64]  # (R,) ascending
    items: NDArray[np.int64]  # (R, C) internal ids
    target: NDArray[np.int64]  # (R,) column of the target
    drawn: NDArray[np.bool_]  # (R,) False: there for a rare group's sake (``RowSample``)
    first: NDArray[np.float64]  # (R, C) scores, 0 at padding
    second: NDArray[np.float64]  # (R, C)
    protocol: dict[str, Any]

    @property
    def real(self) -> NDArray[np.bool_]:
        """(R, C) False at padding."""
        return self.items > 0


def read_pair(first: str | Path, second: str | Path, catalog: pl.DataFrame) -> ScoredPair:
    """Two models' scores of the same candidates.

    Args:
        first, second: scores files.
        catalog: column ``item_id``; row i is the internal item i + 1.

    Raises:
        ValueError: a file is missing, damaged, or without 1 + K scored candidates a row, a score is infinite,
            the two were not measured by one protocol, or they hold other rows or candidates.
    """
    protocols = [_protocol(Path(f)) for f in (first, second)]
    if differ := _differences(*protocols):
        raise ValueError(
            f"{first} and {second} were measured by protocols that differ in {differ}: fuse models that were "
            "tested by one"
        )
    ids = catalog["item_id"].cast(pl.String).to_frame().with_row_index("item", offset=1)
    a, b = (_read(Path(f), ids) for f in (first, second))
    if not a.select(*_KEYS).equals(b.select(*_KEYS)):
        raise ValueError(
            f"{first} ({_size(a)}) and {second} ({_size(b)}) do not hold the same candidates of the same "
            "rows: test both models on the same data and split"
        )
    row, begin, count = np.unique(a["row"].to_numpy(), return_index=True, return_counts=True)
    owner = np.repeat(np.arange(len(row)), count)
    place = np.arange(a.height) - begin[owner]

    def table(column: pl.Series, kind: Any) -> Any:
        cells = np.zeros((len(row), count.max(initial=0)), kind)
        cells[owner, place] = column.to_numpy()
        return cells

    return ScoredPair(
        row.astype(np.int64), table(a["item"], np.int64), table(a["is_target"], np.bool_).argmax(1),
        a["all"].to_numpy()[begin], table(a["score"], np.float64), table(b["score"], np.float64),
        protocols[0],
    )  # fmt: skip


def require_one_data_set(valid: ScoredPair, test: ScoredPair) -> None:
    """Refuse a validation split of other data, and the very rows that are tested.

    Raises:
        ValueError: either is the case.
    """
    theirs = [{k: v for k, v in p.protocol.items() if k not in _ROWS} for p in (valid, test)]
    if differ := _differences(*theirs):
        raise ValueError(
            f"the validation and the test scores were measured by protocols that differ in {differ}: weights "
            "are chosen on the data that is tested"
        )
    if valid.protocol.get("scored") == test.protocol.get("scored"):
        raise ValueError(
            "the validation and the test scores are of the same split, but weights must not be chosen on the "
            "rows that are tested: give the stages of *_valid `split: valid`, and leave out split=valid for "
            "the whole experiment"
        )


def _size(lines: pl.DataFrame) -> str:
    return f"{lines['row'].n_unique()} rows, {lines.height} candidates"


def _protocol(file: Path) -> dict[str, Any]:
    """The protocol that stands beside the scores."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: delete its folder, and make exp tests anew")
    try:
        protocol: dict[str, Any] = json.loads((file.parent / "metrics.json").read_text())[
            "protocol"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} has no readable metrics.json beside it, which says how it was measured: name a scores "
            "file where its test has written it"
        ) from error
    return protocol


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The settings in which two protocols differ; empty where there is none."""
    keys = [k for k in ours | theirs if ours.get(k) != theirs.get(k)]
    return ", ".join(f"{k} ({ours.get(k, 'none')} against {theirs.get(k, 'none')})" for k in keys)


def _read(file: Path, ids: pl.DataFrame) -> pl.DataFrame:
    """Lines by row and internal item, with ``item``, and ``all`` where the file has none."""
    try:
        lines = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} cannot be read ({reason}): delete its folder, and make exp tests anew"
        ) from error
    if missing := [c for c in (*_KEYS, "score") if c not in lines.columns]:
        kind = "whole catalogues ranked" if "above" in lines.columns else "labels"
        raise ValueError(
            f"{file} holds {kind if 'row' in lines.columns else 'no scored rows'} (no {', '.join(missing)}), "
            "but a fusion needs the score of every candidate: test with data.candidates=UniformCandidates or "
            "PopularityCandidates"
        )
    if not lines["score"].is_finite().all():
        raise ValueError(f"{file} holds scores that are no finite numbers, which cannot be mixed")
    found = lines.with_columns(pl.col("item_id").cast(pl.String)).join(
        ids, on="item_id", how="left"
    )
    if found["item"].null_count():
        unknown = found.filter(pl.col("item").is_null())["item_id"][0]
        raise ValueError(
            f"{file} holds the item {unknown!r}, which the data of the fusion does not have"
        )
    if "all" not in found.columns:
        found = found.with_columns(pl.lit(True).alias("all"))
    return found.sort("row", "item")
