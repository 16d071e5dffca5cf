"""From scores to rank counts: candidate lists, and whole catalogues streamed in blocks.

Legend: B rows, C candidates or items of one block, I items (ids 1..I), S seen pairs, K top items,
W columns that a row is given, n cells of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_modules.errors import ModelError

ScoreBlock = Callable[[Tensor], Tensor]  # items (C,) int64 -> scores (B, C)

_EXACT = 2**24  # a float32 sum of so many zeros and ones is exact
_PARTS = 16  # a block is searched for top items by maxima over so many parts


@dataclass(frozen=True)
class RankCounts:
    """Where each row's target stands, as (B,) tensors; what ``metrics.row_metrics`` reads.

    ``top_items`` is 0 (padding) and ``top_scores`` -inf where a row has too few rankable items.
    """

    above: Tensor  # (B,) int64 candidates scored strictly higher than the target
    ties: Tensor  # (B,) int64 other candidates with exactly the same score
    count: Tensor  # (B,) int64 candidates, the target included
    target_score: Tensor  # (B,)
    top_items: Tensor | None = None  # (B, K) int64, best first, ties by lower item id
    top_scores: Tensor | None = None  # (B, K)


def require_no_nan(scores: Tensor, what: str = "score") -> None:
    """Raise ModelError with the row numbers if any of the scores (B, C) is NaN."""
    if bool(scores.sum().isfinite()):  # one cheap pass; only a sum that is not finite needs a look
        return
    bad = scores.isnan()
    if bool(bad.any()):
        rows = bad.any(dim=1).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ModelError(
            f"NaN {what} in {len(rows)} of {len(scores)} rows (batch rows {shown}): a NaN cannot "
            "be ranked; look for a diverged model or an empty history."
        )


def _index_of(target: Tensor, candidates: Tensor) -> Tensor:
    """(B,) column of the target, which must stand exactly once in its row of candidates."""
    hit = candidates == target[:, None]  # (B, C)
    wrong = (hit.sum(1) != 1).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"The target {int(target[row])} stands {int(hit[row].sum())} times among the "
            f"candidates of batch row {row} ({len(wrong)} such rows); expected exactly once."
        )
    return hit.int().argmax(dim=1)


@torch.no_grad()
def rank_candidates(
    scores: Tensor,
    *,
    target_index: Tensor | None = None,
    candidates: Tensor | None = None,
    target: Tensor | None = None,
) -> RankCounts:
    """Rank counts of the target among its candidates.

    Args:
        scores: (B, C), +-inf are ordinary values (inf ties with inf).
        target_index: (B,) the target's column; every column counts.
        candidates, target: (B, C) and (B,) item ids instead; id 0 is padding and does not count.

    Raises:
        ValueError: a score is NaN, the target is missing or there twice, or both or neither of the
            two ways to name the target are given.
    """
    if (target_index is None) == (candidates is None or target is None):
        raise ValueError("Give either target_index, or both candidates and target.")
    real = torch.ones_like(scores, dtype=torch.bool)  # (B, C)
    if candidates is not None and target is not None:
        target_index, real = _index_of(target, candidates), candidates != 0
    assert target_index is not None  # for the type checker
    require_no_nan(scores.masked_fill(~real, 0))
    score = scores.gather(1, target_index[:, None])  # (B, 1)
    above = ((scores > score) & real).sum(1)
    ties = ((scores == score) & real).sum(1) - 1
    return RankCounts(above, ties, real.sum(1), score[:, 0])


def _score(score_block: ScoreBlock, items: Tensor, rows: int) -> Tensor:
    scores = score_block(items)
    if scores.shape != (rows, len(items)):
        raise ValueError(
            f"score_block returned {tuple(scores.shape)} for {len(items)} items, "
            f"expected ({rows}, {len(items)})."
        )
    require_no_nan(scores, f"score among items {int(items[0])}..{int(items[-1])}")
    return scores if scores.is_floating_point() else scores.double()


def _target_scores(score_block: ScoreBlock, target: Tensor, block_size: int) -> Tensor:
    """(B,) each row's score of its own target, from blocks of the distinct targets."""
    unique, inverse = torch.unique(target, return_inverse=True)
    parts = []
    for start in range(0, len(unique), block_size):
        scores = _score(score_block, unique[start : start + block_size], len(target))
        column = (inverse - start).clamp(
            0, scores.shape[1] - 1
        )  # outside this part: overwritten below
        parts.append(scores.gather(1, column[:, None]))
    part = torch.div(inverse, block_size, rounding_mode="floor")
    return torch.cat(parts, dim=1).gather(1, part[:, None])[:, 0]


def _kth_largest(key: Tensor, k: int) -> Tensor:
    """(B, 1) the k-th largest of each row of ``key`` (B, C)."""
    if key.device.type == "cpu" and key.dtype in (torch.float32, torch.float64):
        # torch.topk sorts pairs of value and place there; NumPy's partition is many times as fast.
        place = key.shape[1] - k
        return torch.from_numpy(np.partition(key.numpy(), place, axis=1)[:, place, None])
    return key.topk(k, dim=1).values[:, -1:]


def _top(key: Tensor, k: int) -> Tensor:
    """(B, k) columns of the largest of ``key`` (B, C), ascending; the lowest ones of a tie group that
    the cut runs through."""
    last = _kth_largest(key, k)
    chosen = key >= last  # (B, C)
    cut = chosen.sum(1, dtype=torch.int32) > k  # (B,)
    if bool(cut.any()):
        rows, low = key[cut], last[cut]
        higher, tied = rows > low, rows == low
        room = k - higher.sum(1, keepdim=True, dtype=torch.int32)
        chosen[cut] = higher | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)


def _beating(key: Tensor, floor: Tensor) -> Tensor:
    """(B, W) columns where ``key`` (B, C) is above its row's floor (B, 1); -1 behind the last."""
    folded = key.view(len(key), math.gcd(key.shape[1], _PARTS), -1)  # (B, P, C / P)
    # Few cells beat the best of all earlier blocks; maxima over the parts say where to look.
    row, place = (folded.amax(1) > floor).nonzero().unbind(1)
    hit, part = (folded[row, :, place] > floor[row]).nonzero().unbind(1)
    row, column = row[hit], part * folded.shape[2] + place[hit]  # (n,) each, row after row
    counts = row.bincount(minlength=len(key))
    nth = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    columns = column.new_full((len(key), int(nth.max()) + 1 if len(row) else 0), -1)
    columns[row, nth] = column
    return columns


class _Best:
    """The best K rankable items of the blocks so far: ``items`` and ``scores`` (B, up to K)."""

    def __init__(self, k: int, target: Tensor, own: Tensor) -> None:
        self.k, self.target, self.own = k, target[:, None], own[:, None]  # (B, 1)
        self.items, self.scores = self.target[:, :0], self.own[:, :0]

    def add(self, scores: Tensor, cells: Tensor, first: int) -> None:
        """Merge a block of ``scores`` (B, C) from item ``first`` on; ``cells`` as ``_cells`` gives them."""
        key = self._key(scores)
        key.view(-1)[cells] = -torch.inf
        here = ((self.target >= first) & (self.target < first + key.shape[1])).flatten()
        key[here, self.target[here, 0] - first] = self._key(self.own[here])[:, 0]
        columns = self._candidates(key)  # (B, W)
        padding, columns = columns < 0, columns.clamp(min=0)
        padding |= key.gather(1, columns) == -torch.inf
        items = (columns + first).masked_fill(padding, 0)
        # A matrix product may have rounded the target's score differently in this block.
        found = torch.where(items == self.target, self.own, scores.gather(1, columns))
        self._merge(items, found.masked_fill(padding, -torch.inf))

    @staticmethod
    def _key(scores: Tensor) -> Tensor:
        """Contiguous copy in which -inf is free for what must not be ranked: a real -inf stays above it."""
        return scores.clamp(min=torch.finfo(scores.dtype).min).contiguous()

    def _candidates(self, key: Tensor) -> Tensor:
        """(B, W) columns, among them every one that belongs to the best K; -1 is none."""
        if self.items.shape[1] == self.k:
            floor = self._key(self.scores[:, -1:]).masked_fill(self.items[:, -1:] == 0, -torch.inf)
            columns = _beating(key, floor)
            if columns.shape[1] <= self.k:
                return columns
        return _top(key, min(self.k, key.shape[1]))

    def _merge(self, items: Tensor, scores: Tensor) -> None:
        """Take items (B, W) in; 0 is padding, which goes behind real items scored -inf."""
        items, scores = torch.cat([self.items, items], 1), torch.cat([self.scores, scores], 1)
        order = items.masked_fill(items == 0, torch.iinfo(items.dtype).max).argsort(dim=1)
        # Stable, so that ties stay by lower item.
        by_score = scores.gather(1, order).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, by_score)[:, : self.k]
        self.items, self.scores = items.gather(1, order), scores.gather(1, order)


def _cells(row: Tensor, item: Tensor, first: int, width: int) -> Tensor:
    """(n,) places in a flat (B, width) block from item ``first`` on, of those pairs that lie in it."""
    return (row * width + item - first)[(item >= first) & (item < first + width)]


def _distinct(cells: Tensor, scratch: Tensor) -> Tensor:
    """Each of the cells (n,) once, without sorting; writes into ``scratch``, which has a place for each."""
    nth = torch.arange(len(cells), dtype=torch.int32, device=cells.device)
    scratch[cells] = nth  # of those that write to one place, one stays
    return cells[scratch[cells] == nth]


def _check_ids(target: Tensor, seen: Tensor | None, num_items: int, block_size: int) -> None:
    if block_size < 1 or num_items < 1:
        raise ValueError(
            f"block_size and num_items must be positive, got {block_size}, {num_items}."
        )
    if len(target) and not 1 <= int(target.min()) <= int(target.max()) <= num_items:
        raise ValueError(
            f"Targets must be item ids in 1..{num_items}, "
            f"got {int(target.min())}..{int(target.max())}."
        )
    if seen is not None and len(seen):
        row, item = ([int(end) for end in column.aminmax()] for column in seen.unbind(1))
        if min(row[0], item[0]) < 0 or row[1] >= len(target) or item[1] > num_items:
            raise ValueError(
                f"seen must hold pairs (batch row < {len(target)}, item <= {num_items}), "
                f"got rows {row[0]}..{row[1]} and items {item[0]}..{item[1]}."
            )


@torch.no_grad()
def rank_catalogue(
    score_block: ScoreBlock,
    num_items: int,
    target: Tensor,
    seen: Tensor | None = None,
    block_size: int = 16_384,
    top_k: int = 0,
) -> RankCounts:
    """Rank counts of the target among all items 1..I, streamed; at most (B, block_size) at a time.

    Infinite scores are ordinary values. If the catalogue fits one block, the target's score is read
    from that very block, so ties are exact; otherwise it comes from ``score_block(distinct
    targets)``, where a matrix product may round the last bit differently than in its own block.

    Args:
        score_block: item ids (C,) -> scores (B, C). What it returns is not written to.
        num_items: I.
        target: (B,) item ids.
        seen: (S, 2) pairs (batch row, item id) that are not ranked; repeats and id 0 are harmless,
            and a row's target is ranked even if it stands here.
        block_size: items a block.
        top_k: K, also return the best K rankable items (fewer if I < K).

    Raises:
        ValueError: NaN scores, ids out of range, or a score block of the wrong shape.
    """
    _check_ids(target, seen, num_items, block_size)
    rows, block_size = len(target), min(block_size, num_items, _EXACT)
    own = None if num_items <= block_size else _target_scores(score_block, target, block_size)
    # What does not compete with the target: what was seen, and the target itself.
    row, item = torch.arange(rows, device=target.device), target
    if seen is not None:
        row, item = torch.cat([seen[:, 0], row]), torch.cat([seen[:, 1], item])
    above = torch.zeros_like(target, dtype=torch.int64)
    ties, count = torch.zeros_like(above), torch.full_like(above, num_items + 1)
    # Zeros and ones, as floats: torch compares and sums them several times as fast as bools.
    # Four bytes each whatever the default type: the same memory is read as integers below.
    buffer = torch.empty(rows * block_size, dtype=torch.float32, device=target.device)
    best: _Best | None = None
    for first in range(1, num_items + 1, block_size):
        width = min(block_size, num_items + 1 - first)
        items = torch.arange(first, first + width, device=target.device)
        scores = _score(score_block, items, rows)  # (B, C)
        own = scores.gather(1, target[:, None] - first)[:, 0] if own is None else own
        cells = _cells(row, item, first, width)
        flags = buffer[: rows * width].view(rows, width)
        for compare, total in ((torch.gt, above), (torch.eq, ties)):
            compare(scores, own[:, None], out=flags).view(-1)[cells] = 0
            total += flags.sum(1).long()
        count -= (_distinct(cells, buffer.view(torch.int32)) // width).bincount(minlength=rows)
        if top_k:
            best = best or _Best(top_k, target, own)
            best.add(scores, cells, first)
    assert own is not None  # for the type checker: there is at least one block
    return RankCounts(above, ties, count, own, *((best.items, best.scores) if best else ()))
