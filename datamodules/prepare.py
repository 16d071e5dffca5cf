"""From a parser's rows to the arrays that every model shares: filtered, numbered, sorted, split, stored.

A prepared folder is named by the hash of what was asked (release, filters, split, candidates, groups,
examples), of the raw files' checksums and of this package's code; it is whole or absent. Its ``digest``
covers content only: two ways to the same arrays agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.examples import Examples, ExampleTable
from datamodules.few_examples import asked_by, codes_of
from datamodules.filters import apply_filters
from datamodules.parsed import Parsed, parsed
from datamodules.prepared import Prepared, store
from datamodules.recipe import Recipe
from datamodules.report import data_report, examples_report
from datamodules.samplers import hashed_integers
from datamodules.splits import eval_positions, sort_histories
from datamodules.types import CONTEXT, SPLIT_NAMES, TEST, TRAIN, VALID, Histories, RawData
from datamodules.versioning import package_digest, publish_folder, value_digest


def prepare(
    recipe: Recipe, load: Callable[[], RawData], asked: dict[str, Any], cache: Path
) -> Prepared:
    """Make the prepared folder, or find it made.

    Args:
        recipe: filters, split, candidates, groups, examples.
        load: parses the release; called only when its rows are not in the cache yet.
        asked: further plain values that name the folder (release, local files' sizes and times).
        cache: the cache root.
    """
    settings = {**recipe.describe(), "order_seed": recipe.order_seed}
    key = value_digest({"recipe": settings, "asked": asked, "code": package_digest()})
    folder = cache / "prepared" / f"{recipe.name}-{key}"
    if not (folder / "manifest.json").is_file():
        rows = parsed(recipe.name, load, asked, cache)
        publish_folder(folder, "manifest.json", lambda part: _write(part, recipe, rows, asked))
    return Prepared(folder)


def _write(part: Path, recipe: Recipe, raw: Parsed, asked: dict[str, Any]) -> None:
    whole = raw.interactions()
    frame, steps = apply_filters(whole, recipe.filters)
    items = _numbered(frame["item_id"], raw.catalog(), "item_id")
    users = _numbered(frame["user_id"], raw.users(), "user_id")
    histories, order = _histories(frame, users, items, recipe, raw.note["ordered"])
    histories, examples, grouped = _with_examples(histories, order, recipe)
    items = items.with_columns(train_count=pl.Series(histories.train_counts()[1:]))
    tables = {SPLIT_NAMES[c]: _rows(histories, c, recipe, examples, grouped) for c in (VALID, TEST)}
    if examples is not None and (examples.code == TRAIN).any():
        tables[SPLIT_NAMES[TRAIN]] = _example_rows(examples, TRAIN)
    report = data_report(whole, raw, steps, items, histories, recipe.groups.sizes(grouped))
    if examples is not None and recipe.examples is not None:
        liked_above = recipe.examples.liked_above
        report["examples"] = examples_report(examples, histories, liked_above)
    counts = {"users": users.height, "items": items.height, "interactions": len(histories.items)}
    if examples is not None:
        for code in (TRAIN, VALID, TEST):
            counts[f"{SPLIT_NAMES[code]}_examples"] = int((examples.code == code).sum())
    manifest = {
        "recipe": recipe.describe(raw.note["ordered"], bool(histories.timestamps.any())),
        "asked": asked,
        "source": raw.note["source"],
        "checksums": raw.note["checksums"],
        "counts": counts,
        "report": report,
    }
    store(part, histories, items, users, tables, manifest)


def _numbered(ids: pl.Series, attributes: pl.LazyFrame | None, key: str) -> pl.DataFrame:
    """One row an id that occurs, in internal order, with its attributes; whole numbers sort as numbers."""
    table = ids.unique().cast(pl.String).to_frame(key)
    number = pl.col(key).cast(pl.Int64, strict=False)
    table = table.sort(number.is_null(), number, pl.col(key))
    if attributes is None:
        return table
    # The first row of an id counts; of the others' text, nothing is read into memory.
    known = attributes.join(table.lazy(), on=key, how="semi").collect()
    known = known.unique(key, keep="first", maintain_order=True)
    return table.join(known, on=key, how="left", maintain_order="left")


def _histories(
    frame: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame, recipe: Recipe, ordered: bool
) -> tuple[Histories, np.ndarray]:
    """Histories in time order with the split's codes, and (N,) the row of ``frame`` of each event."""
    user = _internal(frame["user_id"], users["user_id"])
    item = _internal(frame["item_id"], items["item_id"])
    times = frame["timestamp"]
    stamps = None if times.null_count() == len(times) else times.to_numpy()
    if not ordered:  # the file's order would be an accident of how it was written
        shuffled = hashed_integers(2**62, user, item, seed=recipe.order_seed)
        order = sort_histories(user, shuffled)
    else:
        order = sort_histories(user, stamps)
    counts = np.bincount(user, minlength=users.height + 1)  # (U + 1,)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # (U + 2,)
    if recipe.order is not None:
        order = order[recipe.order(offsets, item[order])]
    histories = Histories(
        offsets=offsets,
        items=item[order],
        split=np.full(len(order), CONTEXT, np.int8),
        timestamps=(np.zeros(len(order), np.int64) if stamps is None else stamps[order]),
        num_items=items.height,
        ratings=frame["rating"].fill_null(float("nan")).to_numpy()[order].astype(np.float32),
    )
    if recipe.examples is None or not recipe.examples.own_split:
        codes = recipe.split(histories.offsets, histories.items, histories.timestamps)
        histories = replace(histories, split=codes.astype(np.int8))
    return histories, order


def _internal(raw: pl.Series, ordered: pl.Series) -> np.ndarray:
    """(N,) int32 internal ids, from 1."""
    codes = raw.cast(pl.Categorical).to_physical()  # (N,)
    distinct = codes.unique()
    names = raw.cast(pl.Categorical).gather(codes.arg_unique()).cast(pl.String)
    known = ordered.to_frame("id").with_row_index("number", offset=1)
    found = names.to_frame("id").join(known, on="id", how="left", maintain_order="left")
    table = np.zeros(int(distinct.max() or 0) + 1, np.int32)
    table[codes.gather(codes.arg_unique()).to_numpy()] = found["number"].to_numpy()
    return table[codes.to_numpy()]


def _with_examples(
    histories: Histories, order: np.ndarray, recipe: Recipe
) -> tuple[Histories, ExampleTable | None, Histories]:
    """The labelled examples, the codes of events that follow from them, and those that groups follow from.

    What is cold is cold whatever a method learns from: groups are those of the recipe without its limits.
    """
    recipe_of = recipe.examples
    if recipe_of is None:
        return histories, None, histories
    first_row = np.full(histories.num_users + 1, len(order), np.int64)  # (U + 1,)
    np.minimum.at(first_row, histories.users, order)
    table = recipe_of(histories, first_row)
    whole = asked_by(recipe_of)
    every = table if whole is recipe_of else whole(histories, first_row)
    return _coded(histories, table, recipe_of), table, _coded(histories, every, whole)


def _coded(histories: Histories, table: ExampleTable, recipe: Examples) -> Histories:
    """With the codes that a recipe gives its events, if it does."""
    if not recipe.limits_training:
        return histories
    return replace(histories, split=codes_of(table, histories, recipe.own_split))


def _rows(
    histories: Histories,
    code: int,
    recipe: Recipe,
    examples: ExampleTable | None,
    grouped: Histories,
) -> pl.DataFrame:
    """The held-out rows of one split: labelled ones where there are examples, else its events."""
    if examples is not None and (examples.code == code).any():
        table = _example_rows(examples, code)
    else:
        position = eval_positions(histories.split, code)  # (R,)
        table = pl.DataFrame(
            {
                "user": histories.users[position].astype(np.int64),
                "position": position.astype(np.int64),
                "target": histories.items[position].astype(np.int64),
            }
        )
    user, target = table["user"].to_numpy(), table["target"].to_numpy()
    groups, names = recipe.groups(grouped, user, target)  # (R, G)
    per_user = np.bincount(user, minlength=histories.num_users + 1)
    columns: dict[str, Any] = {
        "weight": 1.0 / per_user[user],
        **{name: groups[:, g] for g, name in enumerate(names)},
    }
    if "label" not in table.columns:
        candidates = recipe.candidates.draw(histories, user, target, code)  # (R, C) or None
        if candidates is not None:
            columns["candidates"] = candidates
    return table.with_columns(pl.Series(name, values) for name, values in columns.items())


def _example_rows(examples: ExampleTable, code: int) -> pl.DataFrame:
    part = examples.take(examples.code == code)
    return pl.DataFrame(
        {
            "user": part.user,
            "start": part.start,
            "position": part.stop,
            "target": part.target,
            "label": part.label,
        }
    )
