"""Groups of rows by length: every row once, no item cut off, and the same states as without groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.types import Batch
from lightning_modules import length_groups as groups_module
from lightning_modules.gru4rec import GRU4RecModule
from lightning_modules.length_groups import length_groups
from lightning_modules.next_item import NextItemModule
from lightning_modules.sasrec import SASRecModule

ITEMS = 30


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    extra=st.integers(0, 5),
    least=st.sampled_from([0, 1, 50, 10**6]),
    in_order=st.booleans(),
)
def test_groups_cover_every_row_and_cut_off_padding_alone(
    lengths: list[int], extra: int, least: int, in_order: bool
) -> None:
    lengths = sorted(lengths, reverse=True) if in_order else lengths
    width = max(*lengths, 1) + extra
    groups = length_groups(torch.tensor(lengths), width, least)
    assert [start for start, _, _ in groups] == [0, *(stop for _, stop, _ in groups)][:-1]
    assert groups[-1][1] == len(lengths)
    for start, stop, cut in groups:
        assert start < stop
        assert max(lengths[start:stop]) <= cut <= width
    if least == 10**6:
        assert len(groups) == 1
    if least == 0 and in_order and min(lengths) > 0:
        cells = sum((stop - start) * cut for start, stop, cut in groups)
        assert cells < 2 * sum(lengths)


def test_groups_by_hand() -> None:
    length = torch.tensor([50, 26, 25, 13, 12, 3, 1, 1])
    assert length_groups(length, 60, 0) == [
        (0, 2, 50),
        (2, 4, 25),
        (4, 5, 12),
        (5, 6, 3),
        (6, 8, 1),
    ]
    # Six rows of at most 25 spare 150 of 400 cells, then four of at most 12 spare 52 of 150.
    assert length_groups(length, 60, 100) == [(0, 2, 50), (2, 8, 25)]
    assert length_groups(length, 60, 151) == [(0, 8, 50)]
    assert length_groups(torch.tensor([0, 0]), 4, 0) == [(0, 2, 1)]


def batch_of(lengths: list[int], width: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(1, ITEMS + 1, (len(lengths), width), generator=generator)
    targets = torch.randint(1, ITEMS + 1, (len(lengths), width), generator=generator)
    length = torch.tensor(lengths)
    real = torch.arange(width) < length[:, None]
    users = torch.arange(len(lengths))
    return Batch(users, users, history * real, length, targets=targets * real)


@pytest.mark.parametrize("module", [SASRecModule, GRU4RecModule])
def test_states_and_gradients_do_not_know_of_groups(
    module: type[NextItemModule], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = module(ITEMS, max_length=12, dropout=0.0).double().train()
    batch = batch_of([12, 11, 5, 3, 2, 1, 1], 12)
    assert batch.targets is not None
    where = batch.targets > 0
    found = []
    for least in (10**6, 0):
        monkeypatch.setattr(groups_module, "LEAST_ON_CPU", least)
        model.zero_grad()
        states = model._states_by_length(batch, where)
        (states * torch.arange(1, len(states) + 1)[:, None]).sum().backward()
        found.append((states, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (whole, gradients), (parts, of_parts) = found
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(of_parts, gradients)


def test_a_part_of_a_batch_has_its_histories_alone() -> None:
    batch = batch_of([4, 2, 1], 4)
    batch.time, batch.times = torch.tensor([9, 8, 7]), torch.arange(12).view(3, 4)
    batch.liked = torch.ones(3, 4, dtype=torch.bool)
    batch.negatives = torch.tensor([1, 2, 3])  # shared by all rows: as many as rows, by chance
    part = batch.part(1, 3, 2)
    assert (part.row.tolist(), part.length.tolist()) == ([1, 2], [2, 1])
    assert torch.equal(part.history, batch.history[1:, :2])
    assert part.time is not None
    assert part.times is not None
    assert part.liked is not None
    assert (part.time.tolist(), part.times.tolist()) == ([8, 7], [[4, 5], [8, 9]])
    assert part.liked.shape == (2, 2)
    assert (part.targets, part.negatives) == (None, None)
