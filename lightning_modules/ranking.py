"""From scores to rank counts: candidate lists, and whole catalogues streamed in blocks.

Legend: B rows, C candidates or items of one block, I items (ids 1..I), S seen pairs, K top items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ScoreBlock = Callable[[Tensor], Tensor]  # items (C,) int64 -> scores (B, C)


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
    """Raise ValueError with the row numbers if any of the scores (B, C) is NaN."""
    if bool(scores.sum().isfinite()):  # one cheap pass; only a sum that is not finite needs a look
        return
    bad = scores.isnan()
    if bool(bad.any()):
        rows = bad.any(dim=1).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ValueError(
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


def _blocks(num_items: int, block_size: int, device: torch.device) -> Iterator[Tensor]:
    for start in range(1, num_items + 1, block_size):
        yield torch.arange(start, min(start + block_size, num_items + 1), device=device)


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


def _top(key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, columns), (B, k) each: the largest, best first, ties by lower column."""
    values, column = key.topk(k, dim=1)
    last = values[:, -1:]
    # topk breaks ties at will. Where the cut runs through a tie group, choose its lowest columns.
    cut = (key == last).sum(1) > (values == last).sum(1)  # (B,)
    if bool(cut.any()):
        rows, low = key[cut], last[cut]
        tied = rows == low
        room = k - (rows > low).sum(1, keepdim=True)
        chosen = (rows > low) | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))
        column[cut] = chosen.nonzero()[:, 1].view(-1, k)
    column = column.sort(dim=1).values
    values, order = key.gather(1, column).sort(dim=1, descending=True, stable=True)
    return values, column.gather(1, order)


def _block_top(scores: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(scores, items) of a block's best, (B, min(k, C)) each; excluded items are NaN on entry."""
    # A real -inf stays above the excluded, which get item 0.
    key = scores.clamp(min=torch.finfo(scores.dtype).min).nan_to_num(-torch.inf, posinf=torch.inf)
    key, column = _top(key, min(k, len(items)))
    best = scores.gather(1, column)
    excluded = best.isnan()
    return best.masked_fill(excluded, -torch.inf), items[column].masked_fill(excluded, 0)


def _merge(
    old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """The best k of two (scores, items) lists; earlier blocks have lower ids and win ties."""
    if old is None:
        return new
    scores, items = (torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))
    # Stable sorts by padding (item 0), then score: padding goes behind real items scored -inf.
    order = (items == 0).int().argsort(dim=1, stable=True)
    by_score = scores.gather(1, order).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, by_score)[:, :k]
    return scores.gather(1, order), items.gather(1, order)


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
        low, high = seen.amin(0).tolist(), seen.amax(0).tolist()
        if min(low) < 0 or high[0] >= len(target) or high[1] > num_items:
            raise ValueError(
                f"seen must hold pairs (batch row < {len(target)}, item <= {num_items}), "
                f"got rows {low[0]}..{high[0]} and items {low[1]}..{high[1]}."
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
    rows = torch.arange(len(target), device=target.device)
    count = torch.full_like(target, num_items, dtype=torch.int64)
    above, ties = torch.zeros_like(count), torch.zeros_like(count)
    own = None if num_items <= block_size else _target_scores(score_block, target, block_size)
    top: tuple[Tensor, Tensor] | None = None
    for items in _blocks(num_items, block_size, target.device):
        first, stop = int(items[0]), int(items[-1]) + 1
        scores = _score(score_block, items, len(target)).clone()  # (B, C)
        if own is None:
            own = scores.gather(1, target[:, None] - first)[:, 0]
        if seen is not None:
            here = seen[(seen[:, 1] >= first) & (seen[:, 1] < stop)]
            scores[here[:, 0], here[:, 1] - first] = torch.nan  # compares False with everything
        inside = rows[(target >= first) & (target < stop)]
        at = (inside, target[inside] - first)
        scores[at] = own[inside]
        above += (scores > own[:, None]).sum(1)
        ties += (scores == own[:, None]).sum(1)
        ties[inside] -= 1  # the target itself
        count -= scores.isnan().sum(1)
        if top_k:
            top = _merge(top, _block_top(scores, items, top_k), top_k)
    assert own is not None  # for the type checker: there is at least one block
    return RankCounts(above, ties, count, own, *(reversed(top) if top else ()))
