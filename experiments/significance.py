"""Paired tests of two rows of one protocol, from their scored-candidates files alone.

Users are drawn anew with replacement, each with all of its rows (the cluster bootstrap: Field & Welsh, 2007),
and both methods are seen through the same draws. numpy alone until a file is read.

Legend: U users, N rows of a test, D draws, M metrics, S seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.intervals import of_alike, paired_rows, scores_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RANKED = ("ndcg@10", "hit@10")  # of ranked rows; labelled ones have their pooled AUC
DRAWS = 2000
_ROUNDING = 1e-9  # of sums of equal numbers
_BLOCK = 4_000_000  # weights held at a time


@dataclass(frozen=True)
class Comparison:
    """A metric of two rows: means over seeds, and what the paired tests say of their difference."""

    metric: str
    ours: float
    theirs: float
    low: float  # of the 95 % interval of the difference
    high: float
    p: float  # two-sided: Wilcoxon over users, from the draws for an AUC
    users: int
    correlation: float | None = (
        None  # Spearman's, of the scores of labelled rows; the mean over seeds
    )

    @property
    def difference(self) -> float:
        """Ours less theirs."""
        return self.ours - self.theirs


def compare(ours: Sequence[Path], theirs: Sequence[Path]) -> list[Comparison]:
    """ndcg@10 and hit@10 of ranked rows, or the AUC of labelled ones, of two rows of one protocol.

    Args:
        ours, theirs: scores files (``callbacks.scores``), one a seed.

    Raises:
        ValueError: the two were not measured on the same rows, or those are of fewer than two users.
    """
    labelled = ["label" in scores_columns(f) for f in (*ours, *theirs)]
    if any(labelled) and not all(labelled):
        raise ValueError(f"of {ours[0]} and {theirs[0]} one holds labelled rows, one ranked ones")
    return _compare_labelled(ours, theirs) if all(labelled) else _compare_ranked(ours, theirs)


def _compare_ranked(ours: Sequence[Path], theirs: Sequence[Path]) -> list[Comparison]:
    both = paired_rows(ours, theirs, RANKED)
    assert both is not None  # neither is labelled
    user, users = _numbered(both, ours[0])
    values = both.select(*RANKED, *(f"{m}_b" for m in RANKED)).to_numpy()  # (N, 2 M)
    mean_a, mean_b = np.split(values.mean(0), 2)
    gaps = values[:, : len(RANKED)] - values[:, len(RANKED) :]  # (N, M)
    rows = np.bincount(user).astype(np.float64)  # (U,)
    sums = np.stack([np.bincount(user, gap) for gap in gaps.T], axis=1).astype(np.float64)  # (U, M)
    blocks = user_draws(users, DRAWS)
    draws = np.concatenate([mean_draws(sums, rows, w) for w in blocks])  # (D, M)
    return [
        Comparison(
            metric, float(mean_a[m]), float(mean_b[m]), *_ends(draws[:, m], users),
            signed_rank(sums[:, m] / rows), users,
        )
        for m, metric in enumerate(RANKED)
    ]  # fmt: skip


def _compare_labelled(ours: Sequence[Path], theirs: Sequence[Path]) -> list[Comparison]:
    import polars as pl

    keys = ("row", "user_id", "label")
    frames = [pl.read_parquet(f, columns=[*keys, "score"]).sort("row") for f in (*ours, *theirs)]
    for frame, file in zip(frames, (*ours, *theirs), strict=True):
        if not frame.select(keys).equals(frames[0].select(keys)):
            raise ValueError(
                f"{ours[0]} and {file} hold different rows: a paired test needs the same rows"
            )
    user, users = _numbered(frames[0], ours[0])
    labels = frames[0]["label"].cast(pl.Boolean).to_numpy()  # (N,)
    scores = [
        f["score"].cast(pl.Float64).to_numpy() for f in frames
    ]  # S_ours + S_theirs times (N,)

    def means(weights: Floats) -> Floats:
        """(2, d): the mean AUC over the seeds, ours and theirs, in each draw."""
        each = [auc_draws(s, labels, user, weights) for s in scores]
        return np.stack([np.mean(part, axis=0) for part in (each[: len(ours)], each[len(ours) :])])

    (a,), (b,) = means(np.ones((users, 1)))
    blocks = user_draws(users, DRAWS, rows=len(user))
    draws = np.concatenate([-np.diff(means(w), axis=0)[0] for w in blocks])  # (D,)
    draws = draws[np.isfinite(draws)]  # a draw without likes, or without dislikes, says nothing
    if len(draws) == 0:
        raise ValueError(f"{ours[0]} has no AUC: its rows are all liked or all disliked")
    # A baseline that no seed changes has one file for all of ours.
    pairs = zip(scores[: len(ours)], cycle(scores[len(ours) :]), strict=False)
    alike = float(np.mean([rank_correlation(a, b) for a, b in pairs]))
    found = Comparison(
        "auc", float(a), float(b), *interval(draws), bootstrap_p(draws), users, alike
    )
    return [found]


def _numbered(rows: Any, file: Path) -> tuple[NDArray[np.int64], int]:
    """The users of a frame's rows as 0..U-1, (N,), and U."""
    user = (rows["user_id"].rank("dense").cast(int) - 1).to_numpy()
    users = int(user.max(initial=-1)) + 1
    if users < 2:
        raise ValueError(f"{file} holds rows of {users} user: a paired test needs at least two")
    return user, users


def user_draws(users: int, draws: int, rows: int = 0, seed: int = 0) -> Iterator[Floats]:
    """How often each user was drawn, (U, d), in blocks of draws; the draws do not depend on the blocks.

    Args:
        users, draws: U and D.
        rows: N, where weights of rows are made from those of users, so that blocks stay small.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    at_once = max(1, _BLOCK // max(users, rows))
    for first in range(0, draws, at_once):
        size = min(at_once, draws - first)
        drawn = generator.integers(users, size=(size, users))  # (d, U)
        place = drawn * size + np.arange(size)[:, None]
        counts = np.bincount(place.ravel(), minlength=users * size)
        yield counts.reshape(users, size).astype(np.float64)


def mean_draws(sums: Floats, rows: Floats, weights: Floats) -> Floats:
    """(d, M): in each draw, the mean over all rows of the drawn users.

    Args:
        sums: (U, M) each user's sum over its rows.
        rows: (U,) their number.
        weights: (U, d) of ``user_draws``.
    """
    return (weights.T @ sums) / (weights.T @ rows)[:, None]


def auc_draws(
    scores: Floats, labels: NDArray[np.bool_], user: NDArray[np.int64], weights: Floats
) -> Floats:
    """(d,): the AUC of all pairs of a like and a dislike in each draw, a tie counting half.

    Scores are sorted once: a like beats the summed weights of the dislikes below it. NaN in draws that lack a
    class.

    Args:
        scores, labels, user: (N,); users are numbered 0..U-1.
        weights: (U, d) how often each user, with all its rows, counts.
    """
    order = np.argsort(scores[~labels], kind="stable")
    disliked, liked = scores[~labels][order], scores[labels]
    below = np.zeros((len(disliked) + 1, weights.shape[1]))  # dislikes of the lowest scores, summed
    np.cumsum(weights[user[~labels][order]], axis=0, out=below[1:])
    beaten = below[np.searchsorted(disliked, liked, "left")]
    beaten += below[np.searchsorted(disliked, liked, "right")]  # twice, for the ties' halves
    times = weights[user[labels]]  # (likes, d)
    with np.errstate(invalid="ignore"):
        auc: Floats = np.einsum("nd,nd->d", times, beaten) / (2 * times.sum(0) * below[-1])
    return auc


def interval(draws: Floats) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the draws, (D,)."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _ends(draws: Floats, users: int) -> tuple[float, float]:
    """The interval of a mean over users, also where they all have the same: no draw tells those apart."""
    low, high = interval(draws)
    if high - low > _ROUNDING:
        return low, high
    found = of_alike(low, users, least=-1)
    return found.low, found.high


def bootstrap_p(draws: Floats) -> float:
    """Two-sided p of no difference: twice the share of draws on the rarer side of 0, at least 2 / (D + 1).

    One is added to count and draws, so that no p is 0 (Davison & Hinkley, 1997, section 4.2).
    """
    rarer = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(draws) + 1))


def rank_correlation(ours: Floats, theirs: Floats) -> float:
    """Spearman's correlation of two methods' scores (N,) of the same rows; NaN where one scores all alike."""
    from scipy.stats import rankdata  # slow to import

    a, b = (rankdata(s) - (len(s) + 1) / 2 for s in (ours, theirs))
    with np.errstate(invalid="ignore"):
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def signed_rank(gaps: Floats) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of the users' mean differences, (U,); zeros are left out."""
    from scipy.stats import wilcoxon  # slow to import

    gaps = gaps.round(12)  # what is equal but for rounding ties
    return float(wilcoxon(gaps).pvalue) if gaps.any() else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down method (1979), in the order given."""
    adjusted = [0.0] * len(p)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - place) * p[index]))
        adjusted[index] = highest
    return adjusted
