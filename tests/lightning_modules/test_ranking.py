"""Rank counts against plain NumPy loops; blocks, seen items, infinities, ties, top-k."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.ranking import RankCounts, rank_candidates, rank_catalogue

VALUES = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, 2.0, np.inf])


def lookup(table: Tensor) -> Callable[[Tensor], Tensor]:
    """A scorer that reads a (B, I + 1) matrix."""
    return lambda items: table[:, items]


def reference(
    table: np.ndarray, target: np.ndarray, seen: set[tuple[int, int]], top_k: int
) -> list[tuple[int, int, int, list[int]]]:
    """(above, ties, count, best items) of each row, one item at a time."""
    rows = []
    for b, own in enumerate(target):
        items = [i for i in range(1, table.shape[1]) if i == own or (b, i) not in seen]
        above = sum(table[b, i] > table[b, own] for i in items)
        ties = sum(table[b, i] == table[b, own] for i in items) - 1
        best = sorted(items, key=lambda i: (-table[b, i], i))[:top_k]
        rows.append((above, ties, len(items), best))
    return rows


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]], int, int]:
    rows, items = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    flat = draw(st.lists(VALUES, min_size=rows * (items + 1), max_size=rows * (items + 1)))
    target = draw(st.lists(st.integers(1, items), min_size=rows, max_size=rows))
    pair = st.tuples(st.integers(0, rows - 1), st.integers(0, items))
    seen = draw(st.lists(pair, max_size=20))  # repeats, padding and targets on purpose
    table = np.array(flat, dtype=np.float32).reshape(rows, items + 1)
    return table, np.array(target), seen, draw(st.integers(1, 10)), draw(st.integers(0, items))


def require_equal(
    table: np.ndarray,
    target: np.ndarray,
    seen: list[tuple[int, int]],
    block_size: int,
    top_k: int,
) -> None:
    """``rank_catalogue`` gives what the plain loop gives."""
    pairs = torch.tensor(seen, dtype=torch.int64).reshape(-1, 2)
    got = rank_catalogue(
        lookup(torch.tensor(table)),
        table.shape[1] - 1,
        torch.tensor(target),
        pairs,
        block_size,
        top_k,
    )
    for b, (above, ties, count, best) in enumerate(reference(table, target, set(seen), top_k)):
        assert (got.above[b], got.ties[b], got.count[b]) == (above, ties, count)
        assert got.target_score[b] == table[b, target[b]]
        if top_k:
            assert got.top_items is not None
            assert got.top_scores is not None
            padding = min(top_k, table.shape[1] - 1) - len(best)
            assert got.top_items[b].tolist() == best + [0] * padding
            assert got.top_scores[b].tolist() == [*table[b, best], *[-np.inf] * padding]


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_catalogue_equals_a_plain_loop(
    case: tuple[np.ndarray, np.ndarray, list[tuple[int, int]], int, int],
) -> None:
    require_equal(*case)


@st.composite
def long_catalogues(
    draw: st.DrawFn,
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]], int, int]:
    """Blocks wide enough to be searched by parts; scores that rise make every block the best so far."""
    rows, items = draw(st.integers(1, 4)), draw(st.integers(17, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    few = np.array([-np.inf, -1, 0, 0.5, 2, np.inf])
    table = draw(
        st.sampled_from([
            rng.normal(size=(rows, items + 1)),
            np.sort(rng.normal(size=(rows, items + 1))),
            -np.sort(rng.normal(size=(rows, items + 1))),
            rng.choice(few, (rows, items + 1)),
            rng.choice(few[:3], (rows, items + 1), p=[0.9, 0.05, 0.05]),
            np.zeros((rows, items + 1)),
        ])
    ).astype(np.float32)  # fmt: skip
    target = rng.integers(1, items + 1, rows)
    count = draw(st.sampled_from([0, 5, 4 * items]))
    seen = np.stack([rng.integers(0, rows, count), rng.integers(0, items + 1, count)], axis=1)
    block_size = draw(st.sampled_from([5, 16, 32, 48, 128]))
    top_k = draw(st.sampled_from([0, 1, 4, 20, items, items + 3]))
    return table, target, [(int(b), int(i)) for b, i in seen], block_size, top_k


@settings(max_examples=100, deadline=None)
@given(long_catalogues())
def test_long_catalogues_equal_a_plain_loop(
    case: tuple[np.ndarray, np.ndarray, list[tuple[int, int]], int, int],
) -> None:
    require_equal(*case)


@settings(max_examples=50, deadline=None)
@given(catalogues(), st.data())
def test_a_nan_anywhere_raises_with_its_row(
    case: tuple[np.ndarray, np.ndarray, list[tuple[int, int]], int, int], data: st.DataObject
) -> None:
    table, target, seen, block_size, top_k = case
    row = data.draw(st.integers(0, len(table) - 1))
    table[row, data.draw(st.integers(1, table.shape[1] - 1))] = np.nan  # even where it was seen
    pairs = torch.tensor(seen, dtype=torch.int64).reshape(-1, 2)
    scorer, items = lookup(torch.tensor(table)), table.shape[1] - 1
    with pytest.raises(ValueError, match=rf"NaN score .*batch rows {row}\)"):
        rank_catalogue(scorer, items, torch.tensor(target), pairs, block_size, top_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("block_size", [300, 1000])
def test_half_precision_whole_numbers_and_shared_rows_count_exactly(
    dtype: torch.dtype, block_size: int
) -> None:
    one = (
        torch.arange(1001) % 7
    )  # 143 times each, 0 as padding too; 257 and more are not bfloat16's
    shared = one.to(dtype).expand(3, -1)
    target = torch.tensor([6, 7, 13])
    seen = torch.tensor([[0, 13], [0, 13], [1, 1], [2, 13]])
    got = rank_catalogue(lambda items: shared[:, items], 1000, target, seen, block_size, top_k=2)
    above = (one[1:] > one[target][:, None]).sum(1) - torch.tensor([0, 1, 0])
    same = (one[1:] == one[target][:, None]).sum(1) - 1 - torch.tensor([1, 0, 0])
    assert (got.above.tolist(), got.ties.tolist()) == (above.tolist(), same.tolist())
    assert got.count.tolist() == [999, 999, 1000]
    assert got.top_items is not None
    assert got.top_items.tolist() == [[6, 20], [6, 13], [6, 13]]


@pytest.mark.parametrize("block_size", [16, 32])
def test_top_items_hold_the_targets_own_score_where_its_block_rounds_differently(
    block_size: int,
) -> None:
    table = torch.arange(65.0)[None]  # item 64 is the best

    def score(items: Tensor) -> Tensor:
        return table[:, items] + (
            0.75 if len(items) == 1 else 0.0
        )  # the target alone: a little more

    got = rank_catalogue(score, 64, torch.tensor([50]), None, block_size, top_k=15)
    assert got.above.item() == 14
    assert got.top_items is not None
    assert got.top_scores is not None
    assert got.top_items[0].tolist() == list(range(64, 49, -1))
    assert got.top_scores[0].tolist() == [*range(64, 50, -1), 50.75]


def test_a_block_never_exceeds_its_size_and_the_scorer_sees_every_item_once() -> None:
    rows, items, block_size = 3, 200_000, 4_096
    asked: list[Tensor] = []

    def score(block: Tensor) -> Tensor:
        asked.append(block)
        return torch.zeros(rows, len(block))

    for _ in range(2):  # two batches
        asked.clear()
        got = rank_catalogue(score, items, torch.tensor([1, 7, items]), None, block_size, top_k=5)
        assert max(len(block) for block in asked) == block_size
        assert torch.equal(asked[0], torch.tensor([1, 7, items]))  # the targets, then the catalogue
        assert torch.equal(torch.cat(asked[1:]), torch.arange(1, items + 1))
        assert got.ties.tolist() == [items - 1] * rows
        assert got.top_items is not None
        assert got.top_items.tolist() == [[1, 2, 3, 4, 5]] * rows


def test_distinct_targets_are_scored_in_blocks_too() -> None:
    widths: list[int] = []
    table = torch.arange(51.0).expand(20, 51)

    def score(items: Tensor) -> Tensor:
        widths.append(len(items))
        return table[:, items]

    target = torch.arange(50, 30, -1)
    got = rank_catalogue(score, 50, target, block_size=6)
    assert max(widths) == 6
    assert got.above.tolist() == list(range(20))


def test_targets_do_not_count_against_themselves_when_their_block_rounds_differently() -> None:
    table = torch.tensor([[0.0, 1.0, 2.0, 3.0]])

    def score(items: Tensor) -> Tensor:
        return table[:, items] + (1e-3 if len(items) > 1 else 0.0)  # blocks score a little higher

    got = rank_catalogue(score, 3, torch.tensor([3]), block_size=2)
    assert (got.above.item(), got.ties.item(), got.target_score.item()) == (0, 0, 3.0)


def test_a_default_type_of_half_precision_changes_nothing() -> None:
    table = torch.randn(50, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([3, 7])
    seen = torch.tensor([[0, 5], [1, 9]])

    def ranked() -> RankCounts:
        score = lambda items: table[items - 1].expand(2, -1)  # noqa: E731
        return rank_catalogue(score, 50, target, seen, block_size=20)

    expected = ranked()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = ranked()
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("above", "ties", "count"):
        assert torch.equal(getattr(got, name), getattr(expected, name))


def test_the_scorers_tensor_is_left_alone() -> None:
    table = torch.rand(2, 6)
    before = table.clone()
    rank_catalogue(lambda items: table[:, 1:], 5, torch.tensor([1, 2]), torch.tensor([[0, 3]]))
    assert torch.equal(table, before)


@pytest.mark.parametrize("block_size", [2, 100])
def test_nan_scores_raise_with_their_rows(block_size: int) -> None:
    table = torch.zeros(4, 6)
    table[1, 4] = table[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN score among items .*rows"):
        rank_catalogue(lookup(table), 5, torch.ones(4, dtype=torch.int64), block_size=block_size)
    with pytest.raises(ValueError, match=r"in 2 of 4 rows \(batch rows 1, 3\)"):
        rank_candidates(table, target_index=torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("target", "seen", "message"),
    [
        ([0], None, r"in 1\.\.5, got 0"),
        ([6], None, r"in 1\.\.5, got 6"),
        ([1], [[1, 1]], "batch row < 1"),
        ([1], [[0, 6]], "item <= 5"),
    ],
)
def test_ids_out_of_range_raise(
    target: list[int], seen: list[list[int]] | None, message: str
) -> None:
    pairs = None if seen is None else torch.tensor(seen)
    with pytest.raises(ValueError, match=message):
        rank_catalogue(lookup(torch.zeros(1, 6)), 5, torch.tensor(target), pairs)


def test_a_block_of_the_wrong_shape_raises() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3\) for 5 items, expected \(2, 5\)"):
        rank_catalogue(lambda items: torch.zeros(1, 3), 5, torch.tensor([1, 2]))


def test_candidates_by_id_skip_padding_and_by_column_count_everything() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 9.0], [torch.inf, torch.inf, -torch.inf, 0.0]])
    candidates = torch.tensor([[5, 6, 7, 0], [1, 2, 3, 4]])
    got = rank_candidates(scores, candidates=candidates, target=torch.tensor([6, 2]))
    assert (got.above.tolist(), got.ties.tolist(), got.count.tolist()) == ([1, 0], [1, 1], [3, 4])
    got = rank_candidates(scores, target_index=torch.tensor([1, 2]))
    assert (got.above.tolist(), got.ties.tolist(), got.count.tolist()) == ([2, 3], [1, 0], [4, 4])
    assert got.target_score.tolist() == [1.0, -torch.inf]


@pytest.mark.parametrize("candidates", [[[1, 2]], [[3, 3]]])
def test_a_missing_or_repeated_target_raises(candidates: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"target 3 stands [02] times"):
        rank_candidates(
            torch.zeros(1, 2), candidates=torch.tensor(candidates), target=torch.tensor([3])
        )
