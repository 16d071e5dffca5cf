"""Histories cut into blocks and windows, and the order in which their texts can be written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.user_summaries.blocks import Cut, Plan, Step, blocks, windows

sizes = st.integers(1, 9)
histories = st.lists(st.integers(0, 14), min_size=1, max_size=6)  # events of each


def spans_of(lengths: list[int]) -> list[tuple[int, int]]:
    """Consecutive histories of these lengths."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [(end - length, end) for length, end in zip(lengths, ends, strict=True)]


@given(st.integers(0, 5), st.integers(0, 40), sizes)
def test_blocks_are_the_history_and_the_newest_is_the_short_one(
    start: int, length: int, size: int
) -> None:
    found = blocks(start, start + length, size)
    assert [e for first, last in found for e in range(first, last)] == [
        *range(start, start + length)
    ]
    counts = [last - first for first, last in found]
    assert counts[:-1] == [size] * (len(counts) - 1)
    assert len(counts) == -(-length // size)
    # A longer history of the same user begins with the same whole blocks.
    assert blocks(start, start + length + 1, size)[: length // size] == found[: length // size]


@given(st.integers(0, 40), sizes, sizes)
def test_windows_show_every_event_and_each_shows_a_new_one(
    length: int, width: int, step: int
) -> None:
    if step > width:
        with pytest.raises(ValueError, match="1 <= step <= window"):
            windows(0, length, width, step)
        return
    found = windows(0, length, width, step)
    assert {e for first, last in found for e in range(first, last)} == {*range(length)}
    assert [first for first, _ in found] == [i * step for i in range(len(found))]
    assert all(last - first == width for first, last in found[:-1])
    ends = [last for _, last in found]
    assert ends == sorted(set(ends))
    assert len(found) == (0 if not length else 1 + max(0, -(-(length - width) // step)))


@pytest.mark.parametrize(
    ("length", "width", "step", "expected"),
    [(5, 5, 5, [(0, 5)]), (6, 5, 5, [(0, 5), (5, 6)]), (3, 5, 2, [(0, 3)]), (0, 5, 5, []),
     (6, 4, 2, [(0, 4), (2, 6)]), (7, 4, 2, [(0, 4), (2, 6), (4, 7)]), (3, 1, 1, [(0, 1), (1, 2), (2, 3)])],
)  # fmt: skip
def test_windows_by_hand(
    length: int, width: int, step: int, expected: list[tuple[int, int]]
) -> None:
    assert windows(0, length, width, step) == expected


@pytest.mark.parametrize(
    "settings",
    [{"block_size": 0}, {"mode": "sliding", "window": 2, "step": 3}, {"mode": "sliding", "step": 0},
     {"mode": "all"}, {"join": "none"}],
)  # fmt: skip
def test_impossible_cuts_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Cut(**settings)


def test_steps_of_each_mode_by_hand() -> None:
    def chain(cut: Cut) -> list[Step]:
        plan = Plan.of(cut, [1], [(10, 17)])
        return [plan.steps[number] for number in plan.chains[0]]

    assert chain(Cut()) == [Step(10, 13), Step(13, 16, (0,)), Step(16, 17, (1,))]
    assert chain(Cut("direct")) == [Step(10, 17)]
    assert chain(Cut("sliding")) == [Step(10, 15), Step(15, 17, (0,))]
    assert chain(Cut("sliding", window=4, step=2)) == [
        Step(10, 14), Step(12, 16, (0,)), Step(14, 17, (1,))
    ]  # fmt: skip
    merged = chain(Cut("sliding", join="merge"))
    assert merged == [Step(10, 15), Step(15, 17), Step(0, 0, (0, 1), merges=True)]
    assert chain(Cut("sliding", window=7, join="merge")) == [Step(10, 17)]  # nothing to merge


def test_a_longer_history_of_a_user_repeats_the_steps_of_a_shorter_one() -> None:
    plan = Plan.of(Cut(), [1, 1, 1, 2], [(0, 6), (0, 7), (0, 8), (9, 12)])
    assert plan.chains == [[0, 1], [0, 1, 2], [0, 1, 3], [4]]
    assert plan.wave == [0, 1, 2, 2, 0]
    assert plan.waves == 3  # the blocks of the longest history
    assert Plan.of(Cut(), [1], [(4, 4)]).chains == [[]]
    assert Plan.of(Cut(), [1], [(4, 4)]).waves == 0


cuts = st.builds(
    Cut, st.sampled_from(["recurrent", "direct", "sliding"]), sizes, st.integers(3, 6),
    st.integers(1, 3), st.sampled_from(["carry", "merge"]),
)  # fmt: skip


@given(cuts, histories, st.integers(1, 4), st.integers(1, 3))
def test_batches_hold_every_step_once_behind_what_it_reads_on_its_own_device(
    cut: Cut, lengths: list[int], size: int, world: int
) -> None:
    spans = spans_of(lengths)
    plan = Plan.of(cut, range(1, len(lengths) + 1), spans)
    costs = [10 * len(s.before) + s.stop - s.start for s in plan.steps]
    seen: list[int] = []
    for rank in range(world):
        done: set[int] = set()
        for batch in plan.batches(costs, size, rank, world):
            assert 0 < len(batch) <= size
            assert len({plan.wave[number] for number in batch}) == 1
            for number in batch:
                assert done.issuperset(plan.steps[number].before)
            assert [costs[n] for n in batch] == sorted((costs[n] for n in batch), reverse=True)
            done.update(batch)
        seen += sorted(done)
    assert sorted(seen) == list(range(len(plan.steps)))
    for (start, stop), chain in zip(spans, plan.chains, strict=True):
        shown = {e for n in chain for e in range(plan.steps[n].start, plan.steps[n].stop)}
        assert shown == {*range(start, stop)}


def test_all_users_steps_of_a_wave_are_batched() -> None:
    plan = Plan.of(Cut(), range(1, 65), spans_of([9] * 63 + [12]))
    batches = plan.batches([0] * len(plan.steps), 64, 0, 1)
    assert [len(batch) for batch in batches] == [64, 64, 64, 1]  # four calls, not 193
