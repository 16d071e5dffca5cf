"""Labelled examples: what each recipe makes of histories, by definition and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.examples import (
    Examples,
    ExampleTable,
    RatedTargets,
    SlidingWindows,
    WithNegatives,
)
from datamodules.few_examples import FewExamples, SampledTest, codes_of
from datamodules.movielens import MovieLensDataModule
from datamodules.splits import LeaveOneOut, RandomByUser
from datamodules.types import CONTEXT, TEST, TRAIN, VALID, Batch, Histories
from datamodules.versioning import value_digest
from lightning_modules.base import RankingModule

lengths = st.lists(st.integers(1, 9), min_size=4, max_size=9)


def _histories(counts: list[int], seed: int = 0, split: Any = None) -> Histories:
    """Users with so many events of 40 items, rated 1 to 5."""
    draw = np.random.default_rng(seed)
    offsets = np.concatenate([[0, 0], np.cumsum(counts)]).astype(np.int64)
    items = np.concatenate([draw.permutation(40)[:n] + 1 for n in counts]).astype(np.int32)
    times = np.zeros(len(items), np.int64)
    codes = np.full(len(items), CONTEXT) if split is None else split(offsets, items, times)
    ratings = draw.integers(1, 6, len(items)).astype(np.float32)
    return Histories(offsets, items, codes.astype(np.int8), times, 40, ratings)


def _appearance(order: list[int]) -> np.ndarray:
    """(U + 1,) first rows, when the file names the users in this order."""
    first = np.full(len(order) + 1, 10**6)
    first[order] = np.arange(len(order)) * 10
    return first


def _tuples(table: ExampleTable) -> list[tuple[int, ...]]:
    columns = (table.user, table.start, table.stop, table.target, table.label, table.code)
    return [tuple(int(v) for v in row) for row in zip(*columns, strict=True)]


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 3), st.integers(3, 30), st.randoms())
def test_sliding_windows_are_those_of_a_plain_loop(
    counts: list[int], length: int, newest: int, random: Any
) -> None:
    histories = _histories(counts)
    order = list(range(1, len(counts) + 1))
    random.shuffle(order)
    expected = []
    for user in order:
        begin, end = histories.offsets[user], histories.offsets[user + 1]
        expected += [(user, at - length, at) for at in range(begin + length, end)]
    expected = expected[-newest:]
    recipe = SlidingWindows(length, 3, newest, valid=0.2, test=0.2)
    valid_from, test_from = round(len(expected) * 0.6), round(len(expected) * 0.8)
    if not 0 < valid_from <= test_from < len(expected):
        with pytest.raises(ValueError, match="too few to cut"):
            recipe(histories, _appearance(order))
        return
    assert histories.ratings is not None
    made = _tuples(recipe(histories, _appearance(order)))
    for row, (user, start, stop) in enumerate(expected):
        code = TRAIN if row < valid_from else VALID if row < test_from else TEST
        liked = histories.ratings[stop] > 3
        assert made[row] == (user, start, stop, histories.items[stop], liked, code)
    assert len(made) == len(expected)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 4), st.sampled_from(["all", "last"]), st.integers(0, 3))
def test_rated_targets_are_the_splits_events(
    counts: list[int], length: int, train: Any, seed: int
) -> None:
    histories = _histories(counts, seed, LeaveOneOut())
    assert histories.ratings is not None
    expected = []
    for user in range(1, histories.num_users + 1):
        begin, end = histories.offsets[user], histories.offsets[user + 1]
        learned = [at for at in range(begin, end) if histories.split[at] == TRAIN]
        for at in range(begin + 1, end):
            if histories.split[at] == TRAIN and train == "last" and at != learned[-1]:
                continue
            start, liked = max(begin, at - length), histories.ratings[at] > 2
            expected.append((user, start, at, histories.items[at], liked, histories.split[at]))
    table = RatedTargets(2, length, train)(histories, _appearance([]))
    assert _tuples(table) == expected


@pytest.mark.parametrize(
    ("balance", "even"), [("natural", ()), ("train", (TRAIN,)), ("all", (0, 1, 2))]
)
def test_balance_drops_the_surplus_only(balance: Any, even: tuple[int, ...]) -> None:
    histories = _histories([9] * 30, 1, LeaveOneOut())
    every = RatedTargets(4)(histories, _appearance([]))
    table = RatedTargets(4, balance=balance, seed=5)(histories, _appearance([]))
    assert set(_tuples(table)) <= set(_tuples(every))
    for code in (TRAIN, VALID, TEST):
        labels, whole = (t.label[t.code == code] for t in (table, every))
        if code in even:
            fewer = min(whole.sum(), (~whole).sum())
            assert labels.sum() == (~labels).sum() == fewer
        else:
            assert len(labels) == len(whole)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 4), st.integers(0, 5))
def test_negatives_were_never_touched_and_are_distinct(
    counts: list[int], negatives: int, seed: int
) -> None:
    histories = _histories(counts, seed, LeaveOneOut())
    table = WithNegatives(negatives, seed=seed)(histories, _appearance([]))
    for stop in np.unique(table.stop):
        rows = table.take(table.stop == stop)
        user = rows.user[0]
        touched = set(
            histories.items[histories.offsets[user] : histories.offsets[user + 1]].tolist()
        )
        assert rows.target[rows.label].tolist() == [histories.items[stop]]
        drawn = rows.target[~rows.label].tolist()
        assert len(set(drawn)) == negatives
        assert not touched & set(drawn)
        assert set(rows.code.tolist()) == {histories.split[stop]}
    positives = np.isin(histories.split, (TRAIN, VALID)).sum() - sum(
        histories.split[histories.offsets[u]] == TRAIN for u in range(1, histories.num_users + 1)
    )
    assert table.label.sum() == positives
    assert TEST not in table.code


@pytest.mark.parametrize("at_least", [1, 2, 4, 9])
def test_what_is_learned_from_has_a_history(at_least: int) -> None:
    """Validation's events are asked about whatever they have."""
    histories = _histories([3, 4, 9, 6], 1, LeaveOneOut())
    table = WithNegatives(1, at_least=at_least)(histories, _appearance([]))
    learned = table.code == TRAIN
    # Of n events the last two are held out: n - 2 - at_least are behind at_least others.
    assert (table.label & learned).sum() == sum(max(0, n - 2 - at_least) for n in (3, 4, 9, 6))
    assert (table.stop - table.start)[learned].min(initial=99) >= at_least
    assert (table.label & ~learned).sum() == 4


def test_negatives_by_popularity_hide_what_is_bought_often() -> None:
    """Item 1 is in each second history, items 2 to 41 in 3 of 40 each, item 42 in none."""
    draw = np.random.default_rng(0)
    own = [
        draw.permutation([*[1] * (u % 2), *(2 + draw.choice(40, 3, replace=False))])
        for u in range(2000)
    ]
    offsets = np.concatenate([[0, 0], np.cumsum([len(items) for items in own])]).astype(np.int64)
    items = np.concatenate(own).astype(np.int32)
    codes = np.full(len(items), TRAIN, np.int8)
    histories = Histories(offsets, items, codes, np.zeros(len(items), np.int64), 42)
    counts = histories.train_counts()
    for by, weight in (("uniform", 1.0), ("popularity", counts[1] / counts[2:42].mean())):
        table = WithNegatives(1, by=by)(histories, _appearance([]))  # type: ignore[arg-type]
        wrong = np.bincount(table.target[~table.label], minlength=43)
        assert (wrong[42] == 0) == (by == "popularity")
        # Only those without it, with 2 of 5 events to learn from, can be shown item 1 as wrong.
        share = 2 / 5 * weight / (weight + 37 + (by == "uniform"))
        assert wrong[1] / wrong.sum() == pytest.approx(share, rel=0.35)  # 50 and 300 draws


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(1, 3), st.integers(30, 80))
def test_exchanged_negatives_tell_nothing_by_the_item_alone(
    seed: int, count: int, users: int
) -> None:
    histories = _histories([7] * users, seed, LeaveOneOut())
    table = WithNegatives(count, by="exchange", seed=seed)(histories, _appearance([]))
    learned = table.take(table.code == TRAIN)
    right, wrong = (
        np.bincount(learned.target[learned.label == is_right]) for is_right in (True, False)
    )
    assert (wrong == count * right).all()
    trained = {
        (int(u), int(i))
        for u, i, code in zip(histories.users, histories.items, histories.split, strict=True)
        if code == TRAIN
    }
    asked = list(zip(learned.user.tolist(), learned.target.tolist(), strict=True))
    assert not trained & {
        pair for pair, right in zip(asked, learned.label, strict=True) if not right
    }
    rows = learned.target.reshape(-1, count + 1)
    assert (np.sort(rows, axis=1)[:, 1:] != np.sort(rows, axis=1)[:, :-1]).all()
    again = WithNegatives(count, by="exchange", seed=seed)(histories, _appearance([]))
    assert (again.target == table.target).all()


def test_rows_of_one_user_have_nobody_to_exchange_with() -> None:
    histories = _histories([9], 0, LeaveOneOut())
    with pytest.raises(ValueError, match=r"user 1 took so much .* take by: popularity"):
        WithNegatives(1, by="exchange")(histories, _appearance([]))


def test_few_examples_keep_k_of_the_base_and_the_rest_is_context() -> None:
    histories = _histories([9] * 20, 2, LeaveOneOut())
    base = RatedTargets(3, length=2)
    table = FewExamples(base, 7, valid=4, seed=1)(histories, _appearance([]))
    every = base(histories, _appearance([]))
    assert set(_tuples(table)) <= set(_tuples(every))
    assert [(table.code == code).sum() for code in (TRAIN, VALID, TEST)] == [7, 4, 20]
    codes = codes_of(table, histories, own_split=False)
    shown = {at for t in _tuples(table) if t[5] == TRAIN for at in range(t[1], t[2] + 1)}
    assert set(np.flatnonzero(codes == TRAIN).tolist()) == shown
    held_out = histories.split != TRAIN
    assert np.array_equal(codes[held_out], histories.split[held_out])
    other = FewExamples(base, 7, seed=2)(histories, _appearance([]))
    assert _tuples(other)[:7] != _tuples(table)[:7]
    with pytest.raises(ValueError, match="asked for 700 train examples, but there are 120"):
        FewExamples(base, 700)(histories, _appearance([]))


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(2, 5), st.integers(1, 6))
def test_few_examples_can_ask_about_what_they_show(
    counts: list[int], length: int, behind: int
) -> None:
    histories = _histories(counts)
    base = SlidingWindows(length, 3, 1_000)
    order = _appearance(list(range(1, len(counts) + 1)))
    try:
        plain = FewExamples(base, 4, seed=3)(histories, order)
    except ValueError:  # too few events for so long windows
        return
    table = FewExamples(base, 4, seed=3, behind=behind)(histories, order)
    assert _tuples(table)[: len(plain)] == _tuples(plain)
    # By a plain loop: of an event that several windows show, the one that shows most before it.
    asked = {t[2] for t in _tuples(plain) if t[5] == TRAIN}
    begins: dict[int, int] = {}
    for _, start, stop, *_, code in _tuples(plain):
        for place in range(start + behind, stop) if code == TRAIN else ():
            if place not in asked:
                begins[place] = min(begins.get(place, start), start)
    more = {t[2]: t for t in _tuples(table)[len(plain) :]}
    assert len(more) == len(table) - len(plain)
    assert {place: t[1] for place, t in more.items()} == begins
    assert histories.ratings is not None
    for place, (user, _, _, target, label, code) in more.items():
        assert (user, target) == (histories.users[place], histories.items[place])
        assert (label, code) == (histories.ratings[place] > 3, TRAIN)
    assert np.array_equal(codes_of(table, histories, True), codes_of(plain, histories, True))


def test_a_sample_of_the_test_leaves_the_rest_as_it_is() -> None:
    histories = _histories([9] * 20, 2, LeaveOneOut())
    base = RatedTargets(3, length=2)
    every = base(histories, _appearance([]))
    sample = SampledTest(base, 5, seed=1)
    table = sample(histories, _appearance([]))
    assert set(_tuples(table)) <= set(_tuples(every))
    counts = [(every.code == TRAIN).sum(), (every.code == VALID).sum(), 5]
    assert [(table.code == code).sum() for code in (TRAIN, VALID, TEST)] == counts
    assert _tuples(SampledTest(base, 20)(histories, _appearance([]))) == _tuples(every)
    assert _tuples(SampledTest(base, 5, seed=2)(histories, _appearance([]))) != _tuples(table)
    assert (sample.own_split, sample.limits_training, sample.liked_above) == (False, False, 3)
    assert sample.together == 1
    assert SampledTest(WithNegatives(count=2, pairs=True), 5).together == 3
    with pytest.raises(
        ValueError, match="SampledTest was asked for 21 test examples, but there are 20"
    ):
        SampledTest(base, 21)(histories, _appearance([]))


def test_events_of_windows_are_never_trained_on_and_tested() -> None:
    histories = _histories([9] * 10, 3)
    table = SlidingWindows(3, 3, 1_000, valid=0.25, test=0.25)(
        histories, _appearance(list(range(10, 0, -1)))
    )
    codes = codes_of(table, histories, own_split=True)
    for code in (VALID, TEST):
        assert set(table.stop[table.code == code]) == set(np.flatnonzero(codes == code))
    assert (codes == TRAIN).any()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda: SlidingWindows(0), "length=0"),
        (lambda: SlidingWindows(valid=0.6, test=0.5), "valid=0.6, test=0.5"),
        (lambda: RatedTargets(3, train="first"), "give one of all, last"),  # type: ignore[arg-type]
        (lambda: RatedTargets(3, balance="both"), "natural, train, all"),  # type: ignore[arg-type]
        (lambda: WithNegatives(0), "count=0"),
        (lambda: WithNegatives(at_least=0), "at_least=0"),
        (lambda: WithNegatives(by="taste"), "give one of uniform, popularity, exchange"),  # type: ignore[arg-type]
        (lambda: FewExamples(WithNegatives(1), 0), "count=0"),
        (lambda: FewExamples(WithNegatives(1, pairs=True), 5), "take pairs=false"),
        (lambda: FewExamples(RatedTargets(3), 4, behind=0), "behind=0"),
        (lambda: FewExamples(WithNegatives(1), 4, behind=2), "a base that tells likes"),
        (lambda: SampledTest(RatedTargets(3), 0), "SampledTest got count=0"),
    ],
)
def test_impossible_arguments_are_named(recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe()


def test_data_without_ratings_has_no_likes() -> None:
    histories = _histories([9] * 5, 0, LeaveOneOut())
    assert histories.ratings is not None
    histories.ratings[3] = np.nan
    with pytest.raises(ValueError, match="1 without a rating; use WithNegatives"):
        RatedTargets(3)(histories, _appearance([]))


class _Recorder(RankingModule):
    """Learns nothing; remembers the batches it was given."""

    labelled = True

    def __init__(self) -> None:
        super().__init__(max_length=4)
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Batch] = []

    def collator(self, training: bool) -> Any:
        from lightning_modules.id_batches import HistoryCollator

        return HistoryCollator(self.max_length)

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.batches.append(batch)
        return self.bias * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def encode(self, batch: Batch) -> torch.Tensor:
        assert batch.liked is not None
        return batch.liked.sum(1).double()

    def score(self, state: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return state[:, None].expand(-1, items.shape[-1])


@pytest.mark.parametrize(
    "examples",
    [SlidingWindows(5, 3, 200), RatedTargets(3), FewExamples(WithNegatives(2), 30, seed=4)],
)
def test_a_trainer_gets_each_example_once_with_its_label(
    examples: Examples, tiny_movielens: Path, tmp_path: Path
) -> None:
    data = MovieLensDataModule(
        root=str(tiny_movielens), cache=str(tmp_path), examples=examples, split=RandomByUser(seed=1)
    )
    data.batch_size = 16
    module = _Recorder()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    table = data.prepared.examples()
    assert table is not None
    seen = {}
    for batch in module.batches:
        assert batch.label is not None
        assert batch.target is not None
        assert batch.liked is not None
        for n, row in enumerate(batch.row.tolist()):
            assert row not in seen
            seen[row] = True
            assert batch.target[n] == table.target[row]
            assert batch.label[n] == table.label[row]
            length = int(batch.length[n])
            events = slice(int(table.stop[row]) - length, int(table.stop[row]))
            assert batch.history[n, :length].tolist() == data.histories.items[events].tolist()
            if examples.liked_above is None:
                assert batch.liked[n, :length].all()
            else:
                assert data.histories.ratings is not None
                liked = data.histories.ratings[events] > examples.liked_above
                assert batch.liked[n, :length].tolist() == liked.tolist()
            assert not batch.liked[n, length:].any()
    assert len(seen) == len(table)
    trainer.test(module, datamodule=data, verbose=False)
    ranked = isinstance(examples, FewExamples)  # WithNegatives leaves the test rows to be ranked
    assert ("all/ndcg@10" in module.results) == ranked
    assert "all/uauc" in module.results
    assert ("all/auc" in module.results) != ranked


def test_a_step_sees_an_event_with_its_negatives(tiny_movielens: Path, tmp_path: Path) -> None:
    data = MovieLensDataModule(
        root=str(tiny_movielens), cache=str(tmp_path), examples=WithNegatives(1, pairs=True)
    )
    data.batch_size = 4
    module = _Recorder()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert len(module.batches) > 2
    for batch in module.batches:
        assert batch.label is not None
        own = {user: [] for user in batch.user.tolist()}  # type: dict[int, list[bool]]
        for user, liked in zip(batch.user.tolist(), batch.label.tolist(), strict=True):
            own[user].append(liked)
        assert all(sum(labels) * 2 == len(labels) for labels in own.values())


def test_rows_that_ask_the_same_have_one_protocol_however_many_are_learned_from(
    tiny_movielens: Path, tmp_path: Path
) -> None:
    def made(examples: Examples, **options: Any) -> MovieLensDataModule:
        return MovieLensDataModule(
            root=str(tiny_movielens), cache=str(tmp_path), examples=examples, **options
        )

    windows = SlidingWindows(5, 3, 200)
    few = [
        FewExamples(windows, 8),
        FewExamples(windows, 9, seed=1),
        FewExamples(windows, 8, valid=3),
    ]
    alike = [made(e) for e in (windows, *few, SampledTest(windows, 10))]
    whole, test = alike[0], alike[0].rows(TEST)
    for data in alike[1:4]:
        assert data.protocol() == whole.protocol()
        assert np.array_equal(data.rows(TEST).groups, test.groups)
    # What was learned from names the folders of stages all the same.
    assert len({data.prepared.digest for data in alike}) == len(alike)
    others = [
        alike[4], made(SlidingWindows(5, 2, 200)), made(SlidingWindows(4, 3, 200)),
        made(windows, mask_seen=False),
    ]  # fmt: skip
    protocols = [value_digest(data.protocol()) for data in (whole, *others)]
    assert len(set(protocols)) == len(protocols)
    # Validation rows are other ones where they are limited.
    for data in alike:
        data.test_code = VALID
    assert alike[1].protocol() == whole.protocol() != alike[3].protocol()
