"""BPR-MF's tables, and iALS against its own objective and a solve of each row by numpy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from datamodules.types import TEST, TRAIN, Batch, Histories
from lightning_modules.mf import BPRMFModule, IALSModule
from lightning_modules.mf.als import Regularisation, Sets, ridge, training_sets

USERS, EVENTS, ITEMS = 9, 6, 7
BY = Regularisation(alpha=0.3, l2=0.05, nu=0.8)


def _histories() -> Histories:
    """Items 1..6 of 7, some twice; the last event of each user is held out; user 9 trains on nothing."""
    draw = np.random.default_rng(1)
    split = np.tile(np.array([TRAIN] * (EVENTS - 1) + [TEST], np.int8), USERS)
    split[-EVENTS:] = TEST
    return Histories(
        offsets=np.concatenate([[0], np.arange(0, USERS * EVENTS + 1, EVENTS)]),
        items=draw.integers(1, ITEMS, USERS * EVENTS).astype(np.int32),
        split=split,
        timestamps=np.zeros(USERS * EVENTS, np.int64),
        num_items=ITEMS,
    )


def _matrix() -> np.ndarray:
    found, matrix = _histories(), np.zeros((USERS, ITEMS))
    for user, item, code in zip(found.users, found.items, found.split, strict=True):
        if code == TRAIN:
            matrix[user - 1, item - 1] = 1
    return matrix


def _objective(users: np.ndarray, items: np.ndarray) -> float:
    """The loss of als.py's docstring, without padding rows."""
    matrix, scores = _matrix(), users @ items.T
    own, met = matrix.sum(1), matrix.sum(0)
    value = (matrix * (1 - scores) ** 2).sum() + BY.alpha * (scores**2).sum()
    value += BY.l2 * ((own + BY.alpha * ITEMS) ** BY.nu * (users**2).sum(1)).sum()
    return float(value + BY.l2 * ((met + BY.alpha * USERS) ** BY.nu * (items**2).sum(1)).sum())


def _ials(**settings: Any) -> IALSModule:
    chosen = {"hidden_size": 4, "alpha": BY.alpha, "l2": BY.l2, "nu": BY.nu} | settings
    module = IALSModule(ITEMS, **chosen)
    data = SimpleNamespace(histories=_histories(), seed=3)
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    module.setup("test")
    return module


def _batch(*histories: list[int]) -> Batch:
    rows, width = torch.arange(len(histories)), max(1, *map(len, histories))
    grid = torch.tensor([h + [0] * (width - len(h)) for h in histories])
    return Batch(rows, rows + 1, grid, (grid > 0).sum(1))


def test_each_row_is_a_ridge_regression() -> None:
    torch.manual_seed(0)
    table = F.pad(torch.randn(ITEMS, 4, dtype=torch.float64), (0, 0, 1, 0))
    solved = training_sets(_histories())[0].solve(table, BY).numpy()
    h = table[1:].numpy()
    for user, row in enumerate(_matrix(), start=1):
        scale = BY.l2 * (row.sum() + BY.alpha * ITEMS) ** BY.nu
        system = (h.T * row) @ h + BY.alpha * h.T @ h + scale * np.eye(4)
        np.testing.assert_allclose(solved[user], np.linalg.solve(system, h.T @ row), atol=1e-10)
    assert not solved[0].any()
    assert not solved[USERS].any()  # no training event, no vector


def test_a_solve_is_the_minimum_of_the_objective() -> None:
    torch.manual_seed(0)
    table = F.pad(torch.randn(ITEMS, 4, dtype=torch.float64), (0, 0, 1, 0))
    by_user, by_item = training_sets(_histories())
    users = by_user.solve(table, BY)
    items = by_item.solve(users, BY)
    draw = np.random.default_rng(0)
    values = [_objective(users[1:].numpy(), x[1:].numpy()) for x in (table, items)]
    assert values[1] < values[0]
    for _ in range(20):
        moved = items[1:].numpy() + 0.01 * draw.standard_normal((ITEMS, 4))
        assert _objective(users[1:].numpy(), moved) > values[1]


def test_rows_are_solved_alike_in_chunks_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = Sets.of(np.array([1, 1, 1, 1, 2, 2, 4, 4]), np.array([1, 2, 3, 3, 1, 5, 2, 6]), 4)
    assert sets.offsets.tolist() == [0, 0, 3, 5, 5, 7]
    table = F.pad(torch.randn(ITEMS, 4), (0, 0, 1, 0))
    whole = sets.solve(table, BY)
    monkeypatch.setattr("lightning_modules.mf.als._CHUNK_CELLS", 1)
    torch.testing.assert_close(sets.solve(table, BY), whole)
    assert not whole[3].any()


def test_a_history_is_folded_in_as_a_user_is_solved_for() -> None:
    module = _ials(iterations=3)
    found = _histories()
    trained = [found.items[found.offsets[u] : found.offsets[u + 1] - 1].tolist() for u in (1, 2)]
    folded = module.encode(_batch(*trained, [3, 1], [1, 3, 3, 1]))
    users = training_sets(found)[0].solve(module.item_vectors(), module.by)
    torch.testing.assert_close(folded[:2], users[1:3])
    torch.testing.assert_close(folded[2], folded[3])  # neither order, repeats nor padding matter
    odd = module.encode(_batch([], [ITEMS]))  # nothing, and an item without training events
    assert not odd.any()
    everything = module.score(folded, torch.arange(1, ITEMS + 1))
    lists = torch.tensor([[3, 7], [1, 1], [2, 4], [6, 5]])
    torch.testing.assert_close(module.score(folded, lists), everything.gather(1, lists - 1))


def test_ials_repeats_and_refuses() -> None:
    assert torch.equal(_ials().item_vectors(), _ials().item_vectors())
    assert not torch.equal(_ials().item_vectors(), _ials(iterations=1).item_vectors())
    with pytest.raises(ValueError, match="alpha, l2 and init_std above 0"):
        IALSModule(ITEMS, alpha=0.0)
    rows = torch.zeros(0, 3, dtype=torch.long)
    assert ridge(torch.ones(8, 4), torch.eye(4), rows, rows > 0, BY).shape == (0, 4)


def _bpr(**settings: Any) -> BPRMFModule:
    torch.manual_seed(0)
    module = BPRMFModule(num_items=5, num_users=3, hidden_size=4, **settings)
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    module._trainer = SimpleNamespace(precision="32-true")  # type: ignore[assignment]
    return module


def _pairs(normaliser: float = 2.0) -> Batch:
    """User 1 with item 2 (negatives 3 and 2, the second an accidental hit), user 3 with item 4 (1, 5)."""
    return Batch(
        torch.arange(2), torch.tensor([1, 3]), torch.tensor([[2], [4]]), torch.tensor([1, 1]),
        targets=torch.tensor([[2], [4]]), negatives=torch.tensor([[[3, 2]], [[1, 5]]]),
        normaliser=torch.tensor(normaliser),
    )  # fmt: skip


@pytest.mark.parametrize("item_bias", [True, False])
def test_bpr_of_pairs_by_hand(item_bias: bool) -> None:
    module = _bpr(item_bias=item_bias, negatives=2)
    network = module.network
    if network.bias is not None:
        torch.nn.init.normal_(network.bias)
    bias = torch.zeros(6, 1) if network.bias is None else network.bias
    scores = network.users @ network.items.T + bias[:, 0]  # (U + 1, I + 1)
    triples = [(1, 2, 3), (3, 4, 1), (3, 4, 5)]
    expected = -sum(F.logsigmoid(scores[u, i] - scores[u, j]) for u, i, j in triples) / 2
    torch.testing.assert_close(module.training_step(_pairs(), 0), expected)
    ranked = module.score(module.encode(_pairs()), torch.arange(1, 6))
    torch.testing.assert_close(ranked, scores[[1, 3], 1:])


@pytest.mark.parametrize("loss", ["bpr", "ce", "sampled_ce"])
def test_only_the_named_rows_get_gradients(loss: Any) -> None:
    module = _bpr(loss=loss, negatives=2)
    batch = _pairs()
    if loss == "ce":
        batch.negatives = None
    module.training_step(batch, 0).backward()
    for table in (module.network.users, module.network.items, module.network.bias):
        assert table is not None
        assert table.grad is not None
        assert not table.grad[0].any()  # padding
        assert table.grad.any()
    grad = module.network.users.grad
    assert grad is not None
    assert grad.any(1).tolist() == [False, True, False, True]


def test_weights_are_taken_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = _bpr(), BPRMFModule(num_items=5, num_users=3, hidden_size=4)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "best.ckpt")
    second.load_weights(tmp_path / "best.ckpt")
    assert torch.equal(first.item_vectors(), second.item_vectors())
    wider = BPRMFModule(num_items=5, num_users=4, hidden_size=4)
    with pytest.raises(ValueError, match=r"users is \(4, 4\), expected \(5, 4\)"):
        wider.load_weights(tmp_path / "best.ckpt")


def test_impossible_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size must be at least 1"):
        BPRMFModule(num_items=5, num_users=3, hidden_size=0)


def test_half_precision_of_the_trainer_leaves_the_solves_alone() -> None:
    module, batch = _ials(), _batch([3, 1], [2, 4, 5])
    whole = module.encode(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.encode(batch), whole)
