"""The columns of ``make beyond``: from scores files, and the prepared data they belong to.

Legend: R rows of a test, k places of a list, I items, C words that describe items, d width, U users.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from datamodules.prepared import Prepared
from datamodules.sources import cache_root
from datamodules.versioning import read_json
from experiments import artifacts, beyond
from experiments.command import whole_number
from experiments.compared import head, title_of, value_of
from experiments.errors import UserError
from experiments.intervals import Interval, mean_by_row, over_seeds, scores_columns
from experiments.results import Row
from experiments.significance import auc_draws
from experiments.table_text import Line, Sheet, Value
from experiments.title_vectors import encoder_name, title_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_array

    Floats = NDArray[np.floating]
    Ints = NDArray[np.int64]

KEPT = 100  # items of a row that a whole ranking's file keeps
CALIBRATION = ("all/ece", "all/brier", "all/log_loss")
# The ages that MovieLens 1M tells apart.
AGES = {0: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56+"}


@dataclass(frozen=True)
class Catalogue:
    """What is known of the items and users of a run's data."""

    ids: pl.DataFrame  # item_id, index from 0
    counts: Ints  # (I,) training events
    words: csr_array  # (I, C) of 0 and 1
    described_by: str  # what the words are
    users: pl.DataFrame  # user_id, and gender and age where they are known
    folder: Path  # prepared
    vectors: Floats | None = None  # (I, d) of titles
    without: str = ""  # why there are none


def sheet_of(rows: Sequence[Row]) -> Sheet:
    """Lists, gaps between groups of users, and calibration of each row.

    Raises:
        UserError: K is no cutoff, or files or data are missing.
    """
    k = _cutoff()
    data = catalogue_of(rows[0])
    if k > 1 and not rows[0].labelled:
        vectors, why = title_vectors(data.folder)
        data = replace(data, vectors=vectors, without=why)
    lines, tied, kept = [], [], set[str]()
    for row in rows:
        each = [_of_file(f, data, k) for f in row.scores]
        cells: dict[str, Value | str] = {"seeds": row.seed_count}
        cells |= {name: _mean([e.get(name) for e in each]) for name in each[0]}
        cells |= {head(m): value_of(row, m) for m in CALIBRATION}
        if not _constant(row.scores[0]):  # chance serves all alike
            cells |= _gaps(row, data)
        lines.append(Line(row.label + (" *" if row.older else ""), cells, row.reference))
        listed = any(told is not None for told in each[0].values())
        kept |= set(each[0]) if listed else set()
        if listed and (share := _cut_in_ties(row.scores[0], k)) >= 0.01:
            tied.append(f"{row.label} {share:.0%}")
    columns = dict.fromkeys(c for line in lines for c in line.cells)
    kept |= {c for line in lines for c, cell in line.cells.items() if str(cell) != "-"}
    shown = [c for c in columns if c in kept]
    return Sheet(
        title_of(rows), shown, lines, _remarks(rows, data, tied, any(" gap " in c for c in shown))
    )


def _cutoff() -> int:
    return whole_number("K", os.environ.get("K", "").strip() or "10", 1, KEPT)


def catalogue_of(row: Row) -> Catalogue:
    """The data that a row was measured on, found by its settings or by its content's digest.

    Raises:
        UserError: it is not in the cache.
    """
    job = read_json(row.scores[0].with_name("stage.json")) or {}
    note = artifacts.prepared_data(job["spec"]["data"], cache_root())
    folder = Path(note["folder"]) if note else _of_content(str(row.protocol.get("content")))
    if folder is None:
        raise UserError(
            f"the data of {row.label} is not in the cache: make data NAME={row.experiment}"
        )
    prepared = Prepared(folder)
    items = prepared.items
    words, described_by = _described(items)
    users = prepared.users
    told = [c for c in ("gender", "age") if c in users.columns]
    return Catalogue(
        items.select(pl.col("item_id").cast(pl.String)).with_row_index("index"),
        prepared.histories.train_counts()[1:],
        words, described_by,
        users.select(pl.col("user_id").cast(pl.String), *told),
        folder,
    )  # fmt: skip


def _of_content(digest: str) -> Path | None:
    """Prepared data of this digest that older code made: settings name another folder since."""
    for file in sorted((cache_root() / "prepared").glob("*/manifest.json")):
        manifest = read_json(file) or {}
        if digest in (manifest.get("digest"), *manifest.get("asked_digests", {}).values()):
            return file.parent
    return None


def _described(items: pl.DataFrame) -> tuple[csr_array, str]:
    """(I, C) of 0 and 1, and what it says: categories, or the words of titles where there are none."""
    from scipy.sparse import csr_array

    by, column = "categories", items["categories"]
    if not (column.list.len().fill_null(0) > 0).any():
        by, column = (
            "title words",
            items["title"].fill_null("").str.to_lowercase().str.extract_all(r"\w+"),
        )
    pairs = pl.DataFrame({"item": np.arange(len(items)), "word": column})
    pairs = pairs.explode("word").drop_nulls("word").unique()
    place = (pairs["item"].to_numpy(), (pairs["word"].rank("dense").cast(pl.Int64) - 1).to_numpy())
    shape = (len(items), max(1, pairs["word"].n_unique()))
    return csr_array((np.ones(pairs.height), place), shape=shape), by


def _of_file(file: Path, data: Catalogue, k: int) -> dict[str, float | None]:
    """What a row's lists are like; nothing of labelled rows, and of scores that are all the same."""
    names = _heads(data, k)
    lists = top_lists(file, data.ids, k)
    if lists is None:
        return dict.fromkeys(names)
    shown = beyond.exposure(lists, len(data.counts))
    told = (
        beyond.coverage(shown),
        beyond.gini(shown),
        beyond.mean_shown(lists, beyond.popularity_percentiles(data.counts)),
        beyond.mean_shown(lists, beyond.information(data.counts)),
        beyond.diversity(lists, data.words),
        math.nan if data.vectors is None else beyond.embedding_diversity(lists, data.vectors),
    )
    return {n: None if np.isnan(v) else v for n, v in zip(names, told, strict=True)}


def _heads(data: Catalogue, k: int) -> tuple[str, ...]:
    return (
        f"coverage@{k}", f"Gini@{k}", f"popularity percentile@{k}", f"novelty@{k} (bits)",
        f"diversity@{k} ({data.described_by})", f"diversity@{k} (text embeddings)",
    )  # fmt: skip


def top_lists(file: Path, ids: pl.DataFrame, k: int) -> Ints | None:
    """(R, k): the best items of each row, as indices; -1 where a list is shorter.

    Ties stand in the file's order. None of labelled rows, and where no score differs from another.

    Args:
        file: a scores file.
        ids: columns item_id and index.
        k: at most ``KEPT``.
    """
    names = scores_columns(file)
    if "label" in names:
        return None
    lines = pl.scan_parquet(file)
    if "all" in names:  # a sample, with rows that are there for a rare group alone
        lines = lines.filter("all")
    if _constant(file):
        return None
    if "top_items" in names:
        whole = lines.select("row", "top_items", "top_scores").collect()
        best = whole.explode("top_items", "top_scores").rename(
            {"top_items": "item_id", "top_scores": "score"}
        )
    else:
        best = lines.select("row", "item_id", "score").collect()
    best = (
        best.drop_nulls("item_id")
        .sort("row", "score", descending=[False, True], maintain_order=True)
        .with_columns(pl.int_range(pl.len()).over("row").alias("place"))
        .filter(pl.col("place") < k)
        .with_columns(pl.col("item_id").cast(pl.String))
        .join(ids, on="item_id", how="left", maintain_order="left")
    )
    if best["index"].null_count():
        raise UserError(f"{file} names items that its data do not have: make exp tests anew")
    row = (best["row"].rank("dense").cast(pl.Int64) - 1).to_numpy()
    lists = np.full((row[-1] + 1, k), -1, np.int64)
    lists[row, best["place"].to_numpy()] = best["index"].to_numpy()
    return lists


def _constant(file: Path) -> bool:
    """Whether no score differs from another, so that nothing is preferred to anything."""
    column = pl.col("top_scores" if "top_scores" in scores_columns(file) else "score").explode()
    ends = pl.scan_parquet(file).select(column.min().alias("low"), column.max().alias("high"))
    low, high = ends.collect().row(0)
    return bool(low == high)


def _cut_in_ties(file: Path, k: int) -> float:
    """The share of rows whose k-th item ties with the next one, so that the file's order chose."""
    names, lines = scores_columns(file), pl.scan_parquet(file)
    if "top_items" in names:
        ordered = lines.select(pl.col("top_scores").alias("score"))
    else:
        ordered = lines.group_by("row").agg(pl.col("score").sort(descending=True))
    at = [pl.col("score").list.get(i, null_on_oob=True) for i in (k - 1, k)]
    return float(ordered.select((at[0] == at[1]).fill_null(False).mean()).collect().item())


def _mean(values: Sequence[float | None]) -> Value:
    told = [v for v in values if v is not None]
    if len(told) < len(values):
        return Value(None)
    mean, half = statistics.fmean(told), over_seeds(told) if len(told) > 1 else 0.0
    # Of seeds that agree there is none, and of its rows none is known.
    return Value(mean, Interval(mean, mean - half, mean + half) if half else None)


def _gaps(row: Row, data: Catalogue) -> dict[str, Value | str]:
    """By activity (cold and warm users), gender and age, of each user's mean over rows and seeds."""
    metric = "uauc" if row.labelled else "ndcg@10"
    values = _by_user(row, metric).join(_activity(row.scores[0]), on="user_id", how="left")
    values = values.join(data.users, on="user_id", how="left")
    if "age" in values.columns:
        values = values.with_columns(age_groups(values["age"]).alias("age"))
    cells: dict[str, Value | str] = {}
    for name in ("activity", "gender", "age"):
        if name not in values.columns:
            continue
        groups = values[name].cast(pl.String).to_list()
        found = beyond.gap(values[metric].to_numpy(), groups)
        note = "" if found is None else f"{found.best} over {found.worst}, p {_p(found.p)}"
        cells[f"{name} gap {metric}"] = Value(found.difference if found else None, note=note)
    return cells


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def age_groups(ages: pl.Series) -> pl.Series:
    """The group of ``AGES`` of each age, null where it is not known."""
    edges, names = list(AGES), np.array(list(AGES.values()))
    place = np.searchsorted(edges, ages.fill_null(0).to_numpy(), side="right") - 1
    return pl.select(pl.when(ages.is_not_null()).then(pl.Series("age", names[place]))).to_series()


def _activity(file: Path) -> pl.DataFrame:
    """user_id and activity: cold, warm, or null between; no such column without these groups."""
    names = scores_columns(file)
    lines = pl.scan_parquet(file)
    if not {"cold_user", "warm_user"} <= set(names):
        return lines.select("user_id").unique().collect()
    told = pl.when("cold_user").then(pl.lit("cold")).when("warm_user").then(pl.lit("warm"))
    return lines.select("user_id", told.alias("activity")).unique("user_id").collect()


def _by_user(row: Row, metric: str) -> pl.DataFrame:
    """user_id and the metric: the mean over a user's rows and the seeds; of labelled rows the user's AUC."""
    if gone := [f for f in row.scores if not f.is_file()]:
        raise UserError(f"{gone[0]} is missing: delete its folder, and make exp tests anew")
    if row.labelled:
        found = pl.concat([_user_aucs(f) for f in row.scores])
    else:
        ranked = mean_by_row(row.scores, (metric,), further=False)
        assert ranked is not None
        found = ranked
    return found.group_by("user_id", maintain_order=True).agg(pl.mean(metric)).sort("user_id")


def _user_aucs(file: Path) -> pl.DataFrame:
    """user_id and uauc, of users with a like and a dislike."""
    lines = pl.read_parquet(file, columns=["user_id", "score", "label"])
    told = []
    for (user,), own in lines.group_by("user_id", maintain_order=True):
        labels = own["label"].cast(pl.Boolean).to_numpy()
        if labels.any() and not labels.all():
            scores = own["score"].cast(pl.Float64).to_numpy()
            (auc,) = auc_draws(scores, labels, np.zeros(len(labels), np.int64), np.ones((1, 1)))
            told.append((user, float(auc)))
    return pl.DataFrame(told, schema={"user_id": pl.String, "uauc": pl.Float64}, orient="row")


def _remarks(rows: Sequence[Row], data: Catalogue, tied: Sequence[str], gaps: bool) -> list[str]:
    told = []
    if not rows[0].labelled:
        told.append(
            "Coverage and Gini's index are over the whole catalogue; a percentile of 0.5 is a random item's; "
            "novelty is the mean -log2 of an item's share of the training events (one added); diversity the "
            f"mean Jaccard distance of a list's pairs by {data.described_by}."
        )
        told.append(
            data.without
            or "Diversity (text embeddings) is the mean of 1 - cosine of a list's pairs, by the embeddings "
            f"of their titles ({encoder_name()})."
        )
        if "top_items" not in scores_columns(rows[0].scores[0]):
            told.append(
                "Lists are chosen from each row's candidates, not from the whole catalogue."
            )
    if tied:
        told.append(f"Lists cut within a tie, by the order of the file: {', '.join(tied)}.")
    if gaps:
        told.append(
            f"A gap is that between the best and the worst served group of at least {beyond.LEAST} users "
            "(p: Kruskal & Wallis's test over users); activity is that of cold and warm users."
        )
    if any(r.older for r in rows):
        told.append('* made by older code; make exp with ARGS="stale=rerun" makes it anew.')
    return told
