"""95 % intervals: of a mean over rows or seeds, and of the paired difference of two rows of one protocol.

No interval is a point: rows that are all alike (0 hits of n) have one by the share of others they may hide.

Legend: R rows of a test, S seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.errors import UserError

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

# Student's t, 97.5 % quantile, for 1..9 degrees of freedom (ISO 2602).
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL = 1.960
_KEYS = ("row", "user_id")
_ROUNDING = 3e-5  # standard deviation that rows alike have at most: their sums are rounded to 2^-32
CHANCE = (
    "random"  # the row without a model whose numbers are expectations: exact, without an interval
)
POOLED = "auc"  # of all rows in one list: no mean of theirs
ALIKE = "[low, high] where all rows are alike"  # how tables call ``of_alike``


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval, which need not lie in its middle."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float | None:
        """Half of its width; None where the estimate is not in its middle."""
        half = (self.high - self.low) / 2
        return half if math.isclose(self.value, self.low + half, abs_tol=1e-9) else None


@dataclass(frozen=True)
class Difference(Interval):
    """Mean difference of a metric over the rows of a test."""

    def __str__(self) -> str:
        """``+0.0123 [+0.0100, +0.0146]``."""
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def of_metric(values: Mapping[str, Mapping[str, float | None]], name: str) -> Interval | None:
    """A metric between 0 and 1 over the rows of a test: 1.96 standard errors either way, or ``of_alike``.

    Args:
        values: of one row of a ``metrics.json``: ``group/metric`` to ``value`` and ``stderr``.
        name: the metric's.

    Returns:
        None where it was not measured, has no error, or is an AUC of which all draws agree.
    """
    told, (group, _, metric) = values.get(name) or {}, name.partition("/")
    value, error = told.get("value"), told.get("stderr")
    if value is None or error is None or not math.isfinite(error):
        return None
    # Of labelled rows, those are means (or draws) over users.
    rows = (values.get(f"{group}/users") or values.get(f"{group}/n") or {}).get("value") or 0.0
    if error * math.sqrt(rows) > _ROUNDING or (error and not rows):
        return Interval(value, value - NORMAL * error, value + NORMAL * error)
    return of_alike(value, int(rows)) if rows and metric != POOLED else None


def of_alike(value: float, rows: int, least: float = 0.0) -> Interval:
    """Mean of n values in [least, 1] that are all the same.

    By Wilson's interval of 0 of n, up to z^2 / (n + z^2) of all rows are of another value, which may be
    anything: of 0 or n hits the ends are Wilson's own.
    """
    others = NORMAL**2 / (rows + NORMAL**2)
    return Interval(value, value - others * (value - least), value + others * (1 - value))


def of_seeds(
    runs: Sequence[Mapping[str, Mapping[str, float | None]]], name: str
) -> Interval | None:
    """A metric over seeds, where several were run and they differ; else over the rows of the test.

    Args:
        runs: ``values`` of ``of_metric`` of each seed.
        name: the metric's.

    Returns:
        None where a seed lacks it, or as ``of_metric``.
    """
    told = [(run.get(name) or {}).get("value") for run in runs]
    values = [v for v in told if v is not None]
    if not values or len(values) < len(told):
        return None
    half = over_seeds(values) if len(values) > 1 else 0.0
    mean = statistics.fmean(values)
    return Interval(mean, mean - half, mean + half) if half else of_metric(runs[0], name)


def over_seeds(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of S >= 2 runs that differ in their seed: t s / sqrt(S)."""
    return _student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _student(free: int) -> float:
    """Student's t, 97.5 % quantile; beyond the table Cornish and Fisher's expansion (within 0.2 %)."""
    z = NORMAL
    expanded = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return _T[free - 1] if free <= len(_T) else expanded


def of_share(values: Sequence[float]) -> Interval:
    """Mean of n values in [0, 1] with Wilson's interval (1927), which is no point where all are 0 or all 1.

    Exact shares of hits have it as it is meant; for values between (ties, means over seeds) it is too wide.
    """
    n, mean, z2 = len(values), statistics.fmean(values), NORMAL**2
    centre, half = mean + z2 / (2 * n), NORMAL * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n**2))
    low, high = ((centre + side * half) / (1 + z2 / n) for side in (-1, 1))
    return Interval(mean, max(0.0, low), min(1.0, high))


def of_change(gaps: Sequence[float]) -> Interval:
    """Mean of n paired differences in [-1, 1] with Agresti & Min's interval (2005).

    Wald's, with one row more on which only ours hits, one on which only theirs does, each counting half, and
    one on which they agree: it is no point where few rows all agree.
    """
    n = len(gaps) + 2
    mean, square = math.fsum(gaps) / n, (math.fsum(g * g for g in gaps) + 1) / n
    half = NORMAL * math.sqrt((square - mean**2) / n)
    return Interval(statistics.fmean(gaps), max(-1.0, mean - half), min(1.0, mean + half))


def paired(ours: Sequence[Path], theirs: Sequence[Path], k: int = 10) -> Difference | None:
    """Difference of ndcg@k between two rows of one protocol, row by row; each is a mean over its seeds.

    The interval takes rows (users, under leave-one-out) as independent and the seeds as given.

    Args:
        ours, theirs: scores files (``callbacks.scores``), one a seed.
        k: cutoff.

    Returns:
        None where a file is missing, is labelled, or holds fewer than two rows.

    Raises:
        ValueError: the two were not measured on the same rows.
    """
    metric = f"ndcg@{k}"
    both = paired_rows(ours, theirs, (metric,))
    if both is None or both.height < 2:
        return None
    gap = (both[metric] - both[f"{metric}_b"]).to_list()
    mean, half = statistics.fmean(gap), NORMAL * statistics.stdev(gap) / math.sqrt(len(gap))
    found = Interval(mean, mean - half, mean + half) if half else of_alike(mean, len(gap), least=-1)
    return Difference(found.value, found.low, found.high)


def paired_rows(
    ours: Sequence[Path], theirs: Sequence[Path], metrics: Sequence[str], further: bool = False
) -> pl.DataFrame | None:
    """Columns row, user_id, each metric of ours and, with ``_b`` behind its name, of theirs; ordered by row.

    Args:
        ours, theirs: scores files, one a seed; what is told is the mean over them.
        metrics: of ``ndcg@k`` and ``hit@k``.
        further: also rows that a sample (``RowSample``) holds for a rare group's sake alone.

    Returns:
        None where a file is missing or is labelled.

    Raises:
        ValueError: the two were not measured on the same rows.
    """
    a, b = (mean_by_row(files, metrics, further) for files in (ours, theirs))
    if a is None or b is None:
        return None
    both = a.join(b, on=_KEYS, how="inner", suffix="_b").sort("row")
    if not a.height == b.height == both.height:
        raise ValueError(
            f"{ours[0]} and {theirs[0]} hold different rows ({a.height} and {b.height}, "
            f"{both.height} in common): a paired interval needs the same rows"
        )
    return both


def mean_by_row(
    files: Sequence[Path], metrics: Sequence[str], further: bool
) -> pl.DataFrame | None:
    """Columns row, user_id and the metrics: the mean over the files."""
    import polars as pl  # not above: it takes Ctrl-C away from whoever imports it

    found = [_row_values(file, metrics, further) for file in files if file.is_file()]
    if not found or len(found) < len(files) or any(f is None for f in found):
        return None
    whole = pl.concat([f for f in found if f is not None])
    return whole.group_by(_KEYS, maintain_order=True).agg(pl.mean(*metrics))


def scores_columns(file: Path) -> list[str]:
    """Names of a scores file's columns.

    Raises:
        UserError: it is missing or damaged.
    """
    import polars as pl

    try:
        return pl.scan_parquet(file).collect_schema().names()
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{file} cannot be read ({reason}): delete its folder, and make exp tests anew"
        ) from error


def _row_values(file: Path, metrics: Sequence[str], further: bool) -> pl.DataFrame | None:
    """The metrics of each row of a scores file; None where rows are labelled."""
    import polars as pl

    names, lines = scores_columns(file), pl.scan_parquet(file)
    if "label" in names:
        return None
    if "all" in names and not further:  # a sample, with rows that are there for a rare group alone
        lines = lines.filter("all")
    if "above" in names:  # whole catalogue: one line a row
        rows = lines.select(*_KEYS, "above", "ties").collect()
    else:  # sampled candidates: one line a candidate
        own = pl.col("score").filter("is_target").first()
        rows = (
            lines.select(*_KEYS, "score", "is_target")
            .collect()
            .group_by(_KEYS, maintain_order=True)
            .agg(
                (pl.col("score") > own).sum().alias("above"),
                ((pl.col("score") == own).sum() - 1).alias("ties"),
            )
        )
    above, ties = (rows[c].to_numpy().astype(np.int64) for c in ("above", "ties"))
    named = [(metric, *metric.split("@")) for metric in metrics]
    return rows.select(_KEYS).with_columns(
        pl.Series(metric, _expected(name, above, ties, int(k))) for metric, name, k in named
    )


def _expected(
    name: str, above: NDArray[np.int64], ties: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    """``expected_hit`` or ``expected_ndcg`` of ``lightning_modules.expected`` (R,), without torch.

    The mean over the positions above + 1 .. above + ties + 1 of the gain, which is 0 after position k.
    """
    position = np.arange(1, k + 1)
    gains = {"hit": np.ones(k), "ndcg": 1 / np.log2(1 + position)}[name]
    sums = np.concatenate([[0.0], np.cumsum(gains)])  # (k + 1,)
    first, last = np.minimum(above, k), np.minimum(above + ties + 1, k)
    found: NDArray[np.float64] = (sums[last] - sums[first]) / (ties + 1)
    return found
