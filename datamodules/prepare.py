"""From a parser's rows to the arrays that every model shares: filtered, numbered, sorted, split, stored.

A prepared folder is named by the hash of what was asked (release, filters, split, candidates, groups),
of the raw files' checksums and of this package's code; it is written beside its place and renamed, so
that it is whole or absent. Its ``digest`` covers content only: two ways to the same arrays agree.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from datamodules.candidates import Candidates
from datamodules.filters import Filter, apply_filters
from datamodules.report import data_report
from datamodules.splits import Split, eval_positions, sort_histories
from datamodules.types import SPLIT_NAMES, TEST, VALID, EvalRows, Histories, RawData
from datamodules.versioning import code_digest, read_json, value_digest, write_json


class Groups(Protocol):
    """Marks cold and warm rows."""

    def __call__(
        self, histories: Histories, user: np.ndarray, target: np.ndarray
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Membership (R, G) of rows with these users and targets (R,), and the G names."""
        ...

    def sizes(self, histories: Histories) -> dict[str, int]:
        """Users and items in each group, for the data report."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What to do with a release's rows."""

    name: str
    filters: Sequence[Filter]
    split: Split
    candidates: Candidates
    groups: Groups

    def describe(self) -> dict[str, Any]:
        """Plain values that name the protocol (dataclass reprs list every argument)."""
        return {
            "name": self.name,
            "filters": [repr(f) for f in self.filters],
            "split": repr(self.split),
            "ties": "stable sort by user and time; equal times keep the raw file's order",
            "candidates": repr(self.candidates),
            "groups": repr(self.groups),
        }


@dataclass(frozen=True)
class Prepared:
    """A prepared folder; arrays are read when they are asked for."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Recipe, digest, counts and the data report."""
        manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        return manifest

    @property
    def digest(self) -> str:
        """Content digest of events, ids, split, groups and candidates."""
        return str(self.manifest["digest"])

    @cached_property
    def items(self) -> pl.DataFrame:
        """Catalogue in internal order: row ``i`` is item ``i + 1``."""
        return pl.read_parquet(self.folder / "items.parquet")

    @cached_property
    def users(self) -> pl.DataFrame:
        """Users in internal order: row ``u`` is user ``u + 1``."""
        return pl.read_parquet(self.folder / "users.parquet")

    @cached_property
    def histories(self) -> Histories:
        """Every user's events in time order."""
        events = pl.read_parquet(self.folder / "events.parquet")
        return _histories(events, self.users.height, self.items.height)

    def rows(self, code: int) -> EvalRows:
        """The held-out events of one split with groups and candidates."""
        table = pl.read_parquet(self.folder / f"{SPLIT_NAMES[code]}.parquet")
        names = tuple(c for c in table.columns if c not in _ROW_COLUMNS)
        candidates = table["candidates"].to_numpy() if "candidates" in table.columns else None
        return EvalRows(
            user=table["user"].to_numpy(),
            position=table["position"].to_numpy(),
            target=table["target"].to_numpy(),
            groups=table.select(names).to_numpy(),
            group_names=names,
            weight=table["weight"].to_numpy(),
            candidates=candidates,
        )


_ROW_COLUMNS = ("user", "position", "target", "weight", "candidates")


def prepare(
    recipe: Recipe, load: Callable[[], RawData], asked: dict[str, Any], cache: Path
) -> Prepared:
    """Make the prepared folder, or find it made.

    Args:
        recipe: filters, split, candidates, groups.
        load: parses the release; called only when there is no folder yet.
        asked: further plain values that name the folder (release, local files' sizes and times).
        cache: the cache root.
    """
    code = code_digest(Path(__file__).parent.glob("*.py"))
    key = value_digest({"recipe": recipe.describe(), "asked": asked, "code": code})
    folder = cache / "prepared" / f"{recipe.name}-{key}"
    if not (folder / "manifest.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(part, recipe, load(), asked)
            _publish(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return Prepared(folder)


def _publish(part: Path, folder: Path) -> None:
    try:
        os.rename(part, folder)
    except OSError:
        if not (folder / "manifest.json").is_file():  # not another process that was quicker
            raise


def _write(part: Path, recipe: Recipe, raw: RawData, asked: dict[str, Any]) -> None:
    frame, steps = apply_filters(raw.interactions.frame, recipe.filters)
    items = _numbered(frame["item_id"], raw.catalog.frame, "item_id")
    users = _numbered(frame["user_id"], raw.users, "user_id")
    events = _events(frame, users, items, recipe.split)
    histories = _histories(events, users.height, items.height)
    items = items.with_columns(train_count=pl.Series(histories.train_counts()[1:]))
    tables = {SPLIT_NAMES[code]: _rows(histories, code, recipe) for code in (VALID, TEST)}
    files = {"events": events, "items": items, "users": users, **tables}
    for name, table in files.items():
        table.write_parquet(part / f"{name}.parquet")
    protocol = [events, items.select("item_id"), users.select("user_id"), *tables.values()]
    manifest = {
        "recipe": recipe.describe(),
        "asked": asked,
        "digest": _content_digest(protocol),
        "source": raw.source,
        "checksums": raw.checksums,
        "counts": {"users": users.height, "items": items.height, "interactions": events.height},
        "report": data_report(raw, steps, items, histories, recipe.groups),
    }
    write_json(part / "manifest.json", manifest)


def _numbered(ids: pl.Series, attributes: pl.DataFrame | None, key: str) -> pl.DataFrame:
    """One row an id that occurs, in internal order, with its attributes; whole numbers sort as numbers."""
    table = ids.unique().to_frame(key)
    number = pl.col(key).cast(pl.Int64, strict=False)
    table = table.sort(number.is_null(), number, pl.col(key))
    if attributes is None:
        return table
    return table.join(
        attributes.unique(key, keep="first"), on=key, how="left", maintain_order="left"
    )


def _events(
    frame: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame, split: Split
) -> pl.DataFrame:
    """Events with internal ids, sorted by user and time, and what each is for."""
    user = _internal(frame["user_id"], users["user_id"])
    item = _internal(frame["item_id"], items["item_id"])
    times = frame["timestamp"]
    stamps = None if times.null_count() == len(times) else times.to_numpy()
    order = sort_histories(user, stamps)
    events = pl.DataFrame(
        {
            "user": user[order],
            "item": item[order],
            "rating": frame["rating"].gather(order),
            "timestamp": (np.zeros(len(order), np.int64) if stamps is None else stamps)[order],
        }
    )
    histories = _histories(
        events.with_columns(split=pl.lit(0, pl.Int8)), users.height, items.height
    )
    codes = split(histories.offsets, histories.items, histories.timestamps)
    return events.with_columns(split=pl.Series(codes, dtype=pl.Int8))


def _internal(raw: pl.Series, ordered: pl.Series) -> np.ndarray:
    """(N,) int32 internal ids, from 1."""
    table = ordered.to_frame("id").with_row_index("number", offset=1)
    found = raw.to_frame("id").join(table, on="id", how="left", maintain_order="left")
    return found["number"].cast(pl.Int32).to_numpy()


def _histories(events: pl.DataFrame, num_users: int, num_items: int) -> Histories:
    counts = np.bincount(events["user"].to_numpy(), minlength=num_users + 1)  # (U + 1,)
    return Histories(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),  # (U + 2,)
        items=events["item"].to_numpy(),
        split=events["split"].to_numpy(),
        timestamps=events["timestamp"].to_numpy(),
        num_items=num_items,
    )


def _rows(histories: Histories, code: int, recipe: Recipe) -> pl.DataFrame:
    position = eval_positions(histories.split, code)  # (R,)
    user = histories.users[position].astype(np.int64)
    target = histories.items[position].astype(np.int64)
    groups, names = recipe.groups(histories, user, target)  # (R, G)
    per_user = np.bincount(user, minlength=histories.num_users + 1)
    columns: dict[str, Any] = {
        "user": user,
        "position": position.astype(np.int64),
        "target": target,
        "weight": 1.0 / per_user[user],
        **{name: groups[:, g] for g, name in enumerate(names)},
    }
    candidates = recipe.candidates.draw(histories, user, target, code)  # (R, C) or None
    if candidates is not None:
        columns["candidates"] = candidates
    return pl.DataFrame(columns)


def _content_digest(tables: Sequence[pl.DataFrame]) -> str:
    digest = hashlib.sha256()
    for table in tables:
        for column in table.iter_columns():
            digest.update(f"{column.name}:{column.dtype}:{len(column)};".encode())
            if column.dtype == pl.String:
                digest.update("\0".join(column.fill_null("\1").to_list()).encode())
            else:
                digest.update(np.ascontiguousarray(column.to_numpy()).tobytes())
    return digest.hexdigest()[:16]
