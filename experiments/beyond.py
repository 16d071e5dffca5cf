"""What recommendation lists are like besides right: pure functions of lists, counts and groups.

Legend: R rows of a test, k places of a list, I items, C words that describe items, d width, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_array

    Floats = NDArray[np.floating]
    Ints = NDArray[np.int64]

LEAST = 10  # users of a group that is told
_BLOCK = 4096  # lists at a time, so that their vectors take little memory


def exposure(lists: Ints, items: int) -> Ints:
    """(I,): how often each item is shown.

    Args:
        lists: (R, k) item indices from 0, -1 where a list is shorter.
        items: I.
    """
    return np.bincount(lists[lists >= 0], minlength=items)


def coverage(shown: Ints) -> float:
    """Share of the catalogue that is shown to anybody (Ge et al., RecSys 2010), of ``exposure``."""
    return float((shown > 0).mean())


def gini(shown: Ints) -> float:
    """Gini's index of exposure over the catalogue: 0 where all items are shown alike, below 1.

    sum_i (2 i - I - 1) x_i / (I sum x), x ascending, i from 1.

    Raises:
        ValueError: nothing is shown.
    """
    if not shown.sum():
        raise ValueError("Gini's index of no exposure at all")
    x, n = np.sort(shown).astype(np.float64), len(shown)
    return float(max(0.0, ((2 * np.arange(1, n + 1) - n - 1) @ x) / (n * x.sum())))


def popularity_percentiles(counts: Ints) -> Floats:
    """(I,) in (0, 1): the share of items of fewer training events, those of as many counting half.

    An item drawn at random from the catalogue has 0.5 on average.
    """
    ordered = np.sort(counts)
    below = np.searchsorted(ordered, counts, "left") + np.searchsorted(ordered, counts, "right")
    found: Floats = below / (2 * len(counts))
    return found


def information(counts: Ints) -> Floats:
    """(I,) bits: -log2 of an item's share of all training events, one added to each item's count.

    The self-information of Zhou et al., PNAS 2010; the one added keeps items never trained on finite.
    """
    return -np.log2((counts + 1) / (counts.sum() + len(counts)))


def mean_shown(lists: Ints, values: Floats) -> float:
    """Mean of the items' values (I,) over all places of all lists (R, k)."""
    return float(values[lists[lists >= 0]].mean())


def diversity(lists: Ints, words: csr_array) -> float:
    """Mean over lists of the mean Jaccard distance of their pairs (Ziegler et al., WWW 2005).

    Pairs with an item that nothing describes do not count, nor do lists without a pair; NaN without any.

    Args:
        lists: (R, k) item indices, -1 where a list is shorter.
        words: (I, C) of 0 and 1, what describes each item.
    """
    sizes = np.asarray(words.sum(axis=1)).ravel()  # (I,)
    total, pairs = np.zeros(len(lists)), np.zeros(len(lists))
    for a, b in combinations(range(lists.shape[1]), 2):
        left, right = lists[:, a], lists[:, b]
        real = (left >= 0) & (right >= 0) & (sizes[left] > 0) & (sizes[right] > 0)
        one, other = left[real], right[real]
        both = np.asarray(words[one].multiply(words[other]).sum(axis=1)).ravel()
        total[real] += 1 - both / (sizes[one] + sizes[other] - both)
        pairs += real
    told = pairs > 0
    return float((total[told] / pairs[told]).mean()) if told.any() else float("nan")


def embedding_diversity(lists: Ints, vectors: Floats) -> float:
    """Mean over lists of the mean of 1 - cosine of their pairs (Ziegler et al., WWW 2005, of embeddings).

    Of n unit vectors v the cosines of all pairs sum to (|sum v|^2 - n) / 2. Pairs with a zero vector do not
    count, nor do lists without a pair; NaN without any.

    Args:
        lists: (R, k) item indices, -1 where a list is shorter.
        vectors: (I, d), zero where an item has no text.
    """
    shown, places = np.unique(lists, return_inverse=True)  # (S,) of them, and where they stand
    places = places.reshape(lists.shape)
    units = vectors[shown].astype(np.float64)  # (S, d)
    units[shown < 0] = 0
    length = np.linalg.norm(units, axis=1)  # (S,)
    units /= np.where(length > 0, length, 1)[:, None]
    n = (length > 0)[places].sum(axis=1)  # (R,)
    places, n = places[n > 1], n[n > 1]
    if not len(n):
        return float("nan")
    sums = np.zeros(len(n))  # |sum v|^2
    for start in range(0, len(n), _BLOCK):
        block = places[start : start + _BLOCK]
        total = sum(units[column] for column in block.T)  # (B, d)
        sums[start : start + _BLOCK] = (total**2).sum(axis=1)
    distances = 1 - (sums - n) / (n * (n - 1))
    return float(np.clip(distances, 0, 2).mean())  # rounding leaves the range


@dataclass(frozen=True)
class Gap:
    """The groups of users that a method serves best and worst, by the mean of a metric."""

    best: str
    worst: str
    difference: float
    p: float  # of no difference between any of the groups: Kruskal & Wallis's test over users


def gap(values: Floats, groups: Sequence[str | None], least: int = LEAST) -> Gap | None:
    """The gap between groups; None where fewer than two have ``least`` users.

    Args:
        values: (U,) a metric of each user.
        groups: (U,) each user's group, None of users who are in none.
        least: users; means of smaller groups are mostly chance.
    """
    from scipy.stats import kruskal  # slow to import

    names = np.array([g or "" for g in groups])
    members = {g: values[names == g] for g in sorted(set(names.tolist())) if g}
    members = {g: v for g, v in members.items() if len(v) >= least}
    if len(members) < 2:
        return None
    means = {g: float(v.mean()) for g, v in members.items()}
    best, worst = max(means, key=means.__getitem__), min(reversed(means), key=means.__getitem__)
    alike = len(np.unique(values)) == 1  # which the test refuses
    p = 1.0 if alike else float(kruskal(*members.values()).pvalue)
    return Gap(best, worst, means[best] - means[worst], p)
