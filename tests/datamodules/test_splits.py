"""Splits: worked examples, properties on random histories, and the real MovieLens 100K."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.splits import (
    FewShot,
    GlobalTemporal,
    LeaveOneOut,
    RandomByUser,
    eval_positions,
    sort_histories,
    split_report,
)
from datamodules.types import CONTEXT, TEST, TRAIN, VALID

ML100K = Path(__file__).resolve().parents[2].parent / "shared/data/movielens/ml-100k/u.data.gz"
A, V, E, C = TRAIN, VALID, TEST, CONTEXT


def pack(times: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offsets, items, timestamps) of users with these event times; every event its own item."""
    times = [sorted(t) for t in times]
    offsets = np.concatenate([[0, 0], np.cumsum([len(t) for t in times])]).astype(np.int64)
    flat = np.array([s for t in times for s in t], dtype=np.int64)
    return offsets, np.arange(1, len(flat) + 1, dtype=np.int32), flat


TIMES = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=12)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5))), st.booleans())
def test_histories_are_sorted_stably(events, timed):
    user = np.array([u for u, _ in events], dtype=np.int64)
    time = np.array([t for _, t in events], dtype=np.int64)
    order = sort_histories(user, time if timed else None)
    # Python's sort is stable: ties keep the file's order.
    key = (lambda i: events[i]) if timed else (lambda i: events[i][0])
    assert order.tolist() == sorted(range(len(events)), key=key)


def test_leave_one_out_by_hand():
    split = LeaveOneOut()(*pack([[1, 2], [1, 2, 3], [4], [1, 2, 3, 4]]))
    assert split.tolist() == [A, A, A, V, E, A, A, A, V, E]
    assert split.dtype == np.int8
    assert LeaveOneOut(4)(*pack([[1, 2, 3], [1, 2, 3, 4]])).tolist() == [A, A, A, A, A, V, E]


def test_time_fractions_keep_equal_times_together():
    # Ten events at 1 1 2 2 3 4 5 5 5 6: the newest 20 % are two of 5 5 5 6 and the boundary is 5,
    # so all four are TEST; the 20 % before those two (5, 5) share that boundary: VALID is empty.
    data = pack([[1, 1, 3, 5, 6], [2, 2, 4, 5, 5]])
    with pytest.raises(ValueError, match=r"no event for valid"):
        GlobalTemporal(0.2, 0.2)(*data)
    # The newest 40 % before the two: 2 of order 4..7 = 3 4 5 5, so VALID begins at 3.
    assert GlobalTemporal(0.4, 0.2)(*data).tolist() == [A, A, V, E, E, A, A, V, E, E]
    assert GlobalTemporal(0, 0.1)(*data).tolist() == [A, A, A, A, E, A, A, A, A, A]


def test_an_event_on_the_date_belongs_to_the_later_part():
    day = 86_400
    data = pack([[10 * day - 1, 10 * day, 11 * day - 1], [11 * day, 12 * day]])
    # Day 10 of 1970 is 11 January.
    split = GlobalTemporal("1970-01-11", "1970-01-12T00:00:00Z")(*data)
    assert split.tolist() == [A, V, V, E, E]
    assert GlobalTemporal("1970-01-11T02:00:00+02:00", "1970-01-12")(*data).tolist() == [
        *(A, V, V, E, E)
    ]


def test_one_target_a_user_leaves_the_others_as_context():
    data = pack([[1, 4, 5, 8, 9], [2, 5, 9], [7, 8]])
    common = {"valid": "1970-01-01T00:00:04", "test": "1970-01-01T00:00:07"}
    assert GlobalTemporal(**common)(*data).tolist() == [A, V, V, E, E, A, V, E, E, E]
    first = GlobalTemporal(**common, targets="first")(*data)
    assert first.tolist() == [A, V, C, E, C, A, V, E, E, C]
    last = GlobalTemporal(**common, targets="last")(*data)
    assert last.tolist() == [A, C, V, C, E, A, V, E, C, E]


@settings(max_examples=100, deadline=None)
@given(TIMES, st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.1, 0.3]))
def test_temporal_fractions_follow_the_sorted_times(times, valid, test):
    offsets, items, stamps = pack(times)
    ordered = sorted(stamps.tolist())
    tests = max(1, round(test * len(ordered)))
    valids = max(1, round(valid * len(ordered))) if valid else 0
    test_from, valid_from = ordered[-tests], ordered[max(-tests - valids, -len(ordered))]
    expected = [E if t >= test_from else V if t >= valid_from else A for t in stamps]
    parts = {A, V, E} if valid else {A, E}
    if set(expected) != parts:  # too many equal times, or too few events
        with pytest.raises(ValueError, match="leaves no event"):
            GlobalTemporal(valid, test)(offsets, items, stamps)
    else:
        assert GlobalTemporal(valid, test)(offsets, items, stamps).tolist() == expected


@pytest.mark.parametrize("stamps", [None, np.zeros(3, dtype=np.int64)])
def test_temporal_needs_timestamps(stamps):
    offsets, items, _ = pack([[1, 2, 3]])
    with pytest.raises(ValueError, match="needs timestamps"):
        GlobalTemporal(0.1, 0.1)(offsets, items, stamps)


@settings(max_examples=40, deadline=None)
@given(TIMES, st.integers(0, 5), st.sampled_from([("context", CONTEXT), ("train", TRAIN)]))
def test_random_users_are_never_trained_on_but_on_what_they_did_before(times, seed, before):
    offsets, items, stamps = pack(times)
    eligible = [u for u, t in enumerate(times, start=1) if len(t) >= 2]
    tests, valids = max(1, round(0.3 * len(eligible))), max(1, round(0.2 * len(eligible)))
    earlier, code_before = before
    split_of = RandomByUser(0.2, 0.3, seed, earlier)
    if tests + valids >= len(eligible):
        with pytest.raises(ValueError, match="too few"):
            split_of(offsets, items, stamps)
        return
    split = split_of(offsets, items, stamps)
    users = [split[offsets[u] : offsets[u + 1]].tolist() for u in range(1, len(times) + 1)]
    kinds = {code: sum(u[-1] == code for u in users) for code in (VALID, TEST)}
    assert kinds == {VALID: valids, TEST: tests}
    for codes in users:
        held_out = len(codes) >= 2 and codes[-1] in (VALID, TEST)
        assert codes[:-1] == [code_before if held_out else TRAIN] * (len(codes) - 1)
        assert held_out or codes[-1] == TRAIN


def test_random_users_depend_on_the_seed():
    data = pack([[1, 2, 3]] * 40)
    drawn = {tuple(RandomByUser(seed=seed)(*data).tolist()) for seed in (0, 0, 1, 2)}
    assert len(drawn) == 3


def test_few_users():
    data = pack([[1, 2, 3, 4]] * 6 + [[1]])
    base, split = LeaveOneOut()(*data), FewShot(LeaveOneOut(), users=2, seed=3)(*data)
    held_out = base != TRAIN
    assert split[held_out].tolist() == base[held_out].tolist()
    assert set(split[~held_out]) == {TRAIN, CONTEXT}
    by_user = [set(split[4 * u : 4 * u + 2].tolist()) for u in range(6)] + [
        set(split[24:].tolist())
    ]
    assert sorted(map(sorted, by_user)) == [[TRAIN]] * 2 + [[CONTEXT]] * 5


def test_few_examples_have_a_history():
    data = pack(
        [[1, 2, 3, 4, 5]] * 4
    )  # under leave-one-out each user has two TRAIN events with one
    split = FewShot(LeaveOneOut(), examples=8)(*data)
    assert eval_positions(split, TRAIN).tolist() == [1, 2, 6, 7, 11, 12, 16, 17]
    some = FewShot(LeaveOneOut(), examples=3, seed=1)(*data)
    assert (some == TRAIN).sum() == 3
    assert set(eval_positions(some, TRAIN)) < {1, 2, 6, 7, 11, 12, 16, 17}
    with pytest.raises(ValueError, match=r"asked for 9 training events with a history.* has 8"):
        FewShot(LeaveOneOut(), examples=9)(*data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeaveOneOut(2), "min_events=2"),
        (lambda: GlobalTemporal(0.6, 0.4), "valid \\+ test < 1"),
        (lambda: GlobalTemporal(0.1, "2020-01-01"), "two fractions"),
        (lambda: GlobalTemporal("2020-01-01", "2019-01-01"), "before TEST"),
        (lambda: GlobalTemporal("1.1.2020", "2019-01-01"), "ISO format"),
        (lambda: GlobalTemporal(0.1, 0.1, "newest"), "'newest'"),
        (lambda: RandomByUser(0.1, 0.0), "0 < test"),
        (lambda: RandomByUser(0.1, 0.1, earlier="valid"), "give context or train"),
        (lambda: FewShot(LeaveOneOut()), "exactly one"),
        (lambda: FewShot(LeaveOneOut(), users=1, examples=1), "exactly one"),
        (lambda: FewShot(LeaveOneOut(), users=0), "1 or more"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_report_by_hand():
    # User 1: items 1 2 3 at 1 5 5 (TRAIN VALID TEST); user 2: items 1 4 at 6 9 (TRAIN TEST);
    # user 3: item 2 at 2 (TEST, no history, an item and a user never trained on).
    offsets = np.array([0, 0, 3, 5, 6])
    items = np.array([1, 2, 3, 1, 4, 2])
    split = np.array([A, V, E, A, E, E], dtype=np.int8)
    report = split_report(offsets, items, split, np.array([1, 5, 5, 6, 9, 2]))
    assert report["train"] == {"events": 2, "users": 2, "items": 1}
    assert report["valid"] == {
        "events": 1,
        "users": 1,
        "items": 1,
        "cold_users": 0,
        "cold_items": 1,
        "no_history": 0,
    }
    assert report["test"] == {
        "events": 3,
        "users": 3,
        "items": 3,
        "cold_users": 1,
        "cold_items": 3,
        "no_history": 1,
    }
    assert report["context"] == {"events": 0, "users": 0, "items": 0}
    assert report["leakage"] == pytest.approx(2 / 3)  # targets at 5 and 2 are older than 6
    assert report["tied_last_two_users"] == 1
    assert report["tied_last_two_share"] == 0.5  # user 3 has no two events
    assert report["tied_events_share"] == pytest.approx(2 / 6)


def test_report_without_timestamps():
    offsets, items, stamps = pack([[1, 2, 3]])
    for none in (None, np.zeros_like(stamps)):
        report = split_report(offsets, items, LeaveOneOut()(offsets, items, stamps), none)
        assert report["leakage"] is None
        assert report["tied_last_two_users"] is None
        assert report["test"]["events"] == 1


@pytest.mark.skipif(not ML100K.is_file(), reason="MovieLens 100K is not at hand")
def test_movielens_100k():
    with gzip.open(ML100K) as file:
        user, item, _, time = np.loadtxt(file, dtype=np.int64).T
    order = sort_histories(user, time)
    user, item, time = user[order], item[order], time[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user))])
    split = LeaveOneOut()(offsets, item, time)
    report = split_report(offsets, item, split, time)
    assert report["tied_last_two_users"] == 415  # known of the release
    assert report["tied_last_two_share"] == pytest.approx(415 / 943)
    pairs = [tuple(sorted(time[user == u].tolist())[-2:]) for u in range(1, 944)]
    assert sum(a == b for a, b in pairs) == 415
    assert report["train"]["events"] == 100_000 - 2 * 943
    assert (report["valid"]["events"], report["test"]["events"]) == (943, 943)
    # Independent reference, user by user in plain Python.
    newest_train, test_times = 0, []
    for u in range(1, 944):
        events = sorted(time[user == u].tolist())
        newest_train, test_times = max(newest_train, events[-3]), [*test_times, events[-1]]
    assert report["leakage"] == pytest.approx(sum(t < newest_train for t in test_times) / 943)
    temporal = GlobalTemporal(0.1, 0.1)(offsets, item, time)
    assert split_report(offsets, item, temporal, time)["leakage"] == 0
