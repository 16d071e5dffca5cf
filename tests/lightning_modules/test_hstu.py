"""HSTU against a loop over pairs of events, its use of times, and what padding must not change."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import CONTEXT, TRAIN, Batch, Histories, Rows
from lightning_modules.hstu import HSTUModule
from lightning_modules.hstu.model import HSTU, Block, time_buckets

ITEMS = 9
HISTORY = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
LENGTH = torch.tensor([4, 2, 0])
TIMES = torch.tensor([[100, 101, 5_000, 9_000_000], [7, 7, 0, 0], [0, 0, 0, 0]])


def build(seed: int = 0, **settings: Any) -> HSTU:
    """A small network whose every parameter is of order one, so that no part is a no-op."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "num_items": ITEMS, "max_length": 6, "hidden_size": 8, "num_blocks": 2, "num_heads": 2,
        "dropout": 0.0,
    }  # fmt: skip
    network = HSTU(**(defaults | settings))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        network.item_embedding.weight[0] = 0
    return network.eval()


def normed(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()


def derive(network: HSTU, items: list[int], seconds: list[int]) -> Tensor:
    """States (T, d) of one history, event by event and pair by pair, from the paper's equations."""
    d, n = network.hidden_size, len(items)
    x = [
        network.item_embedding.weight[item] * math.sqrt(d) + network.position_embedding.weight[t]
        for t, item in enumerate(items)
    ]
    for block in network.blocks:
        assert isinstance(block, Block)
        parts = [F.silu(block.in_proj.weight @ normed(row)).chunk(4) for row in x]  # U, V, Q, K
        out = []
        for i in range(n):
            mixed = torch.zeros(d)
            for j in range(i + 1):
                apart = abs(seconds[i] - seconds[j])
                bias = block.position_bias[i - j]
                if block.time_bias is not None:
                    bias = bias + block.time_bias[int(math.log(max(1, apart)) / 0.301)]
                width = d // block.num_heads
                for head in range(block.num_heads):
                    cut = slice(head * width, (head + 1) * width)
                    score = parts[i][2][cut] @ parts[j][3][cut] + bias
                    weight = score * torch.sigmoid(score) / network.max_length
                    mixed[cut] = mixed[cut] + weight * parts[j][1][cut]
            gated = parts[i][0] * normed(mixed)
            out.append(x[i] + block.out_proj.weight @ gated + block.out_proj.bias)
        x = out
    if network.final_norm is not None:
        return torch.stack([network.final_norm(row) for row in x])
    return torch.stack([row / row.norm() / network.temperature for row in x])


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("time_bias", [True, False])
def test_equals_a_loop_over_pairs(time_bias: bool, temperature: float | None) -> None:
    network = build(time_bias=time_bias, temperature=temperature)
    with torch.no_grad():
        states, layout = network.packed(HISTORY, LENGTH, TIMES if time_bias else None)
        grid = layout.pad(states)
        for row, n in enumerate(LENGTH.tolist()[:2]):
            expected = derive(network, HISTORY[row, :n].tolist(), TIMES[row, :n].tolist())
            torch.testing.assert_close(grid[row, :n], expected, atol=1e-5, rtol=1e-4)


def test_buckets_grow_by_a_factor() -> None:
    times = torch.tensor([[0, 1, 2, 60, 86_400, 2**31]])
    found = time_buckets(times, 127)[0, 0]
    assert found.tolist() == [0, 0, 2, 13, 37, 71]  # floor(ln(t) / 0.301)
    assert time_buckets(times, 5)[0, 0].tolist() == [0, 0, 2, 5, 5, 5]
    assert torch.equal(time_buckets(times, 127), time_buckets(times, 127).transpose(1, 2))


def test_a_later_event_or_time_changes_no_earlier_state() -> None:
    network = build()
    history, times = HISTORY[:1].clone(), TIMES[:1].clone()
    before = network.packed(history, LENGTH[:1], times)[0]
    history[0, 3], times[0, 3] = 9, 50_000_000
    after = network.packed(history, LENGTH[:1], times)[0]
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[3], after[3])
    times[0, 0] = 1  # every later state reads the time since the first event
    moved = network.packed(history, LENGTH[:1], times)[0]
    assert torch.equal(after[0], moved[0])
    assert not torch.allclose(after[3], moved[3], atol=1e-4)


def test_neither_padding_nor_an_equal_shift_of_all_times_matters() -> None:
    network = build()
    alone = network.last(HISTORY[1:2, :2], LENGTH[1:2], TIMES[1:2, :2])
    wide = F.pad(HISTORY, (0, 2), value=7)
    times = F.pad(TIMES, (0, 2), value=123)
    together = network.last(wide, LENGTH, times + 1_000_000)
    torch.testing.assert_close(together[1:2], alone)
    assert not together[2].any()  # an empty history


def test_scores_with_a_temperature_are_cosines() -> None:
    network = build(temperature=0.5)
    user = network.last(HISTORY[:2], LENGTH[:2], TIMES[:2])
    torch.testing.assert_close(user.norm(dim=1), torch.full((2,), 2.0))
    items = network.item_vectors()
    torch.testing.assert_close(items[1:].norm(dim=1), torch.ones(ITEMS))
    assert not items[0].any()


def module(**settings: Any) -> HSTUModule:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"max_length": 4, "hidden_size": 8, "dropout": 0.0}
    made = HSTUModule(num_items=ITEMS, **(defaults | settings))
    made.log = lambda *a, **k: None  # type: ignore[method-assign]
    made._trainer = SimpleNamespace(precision="32-true")  # type: ignore[assignment]
    return made


def batch(**extra: Any) -> Batch:
    rows = torch.arange(3)
    return Batch(rows, rows + 1, HISTORY, LENGTH, times=TIMES, **extra)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_the_loss_is_cross_entropy_and_reaches_every_parameter(temperature: float | None) -> None:
    made = module(temperature=temperature)
    targets = torch.tensor([[2, 3, 0, 5], [0, 7, 0, 0], [0, 0, 0, 0]])
    loss = made.training_step(batch(targets=targets, normaliser=torch.tensor(8.0)), 0)
    states, layout = made.network.packed(HISTORY, LENGTH, TIMES)
    table = made.network.item_embedding.weight[1:]
    if temperature is not None:
        table = table / table.norm(dim=1, keepdim=True)
    where = targets > 0
    logits = layout.pad(states)[where] @ table.T
    expected = F.cross_entropy(logits, targets[where] - 1, reduction="sum") / 8
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert not made.network.item_embedding.weight.grad[0].any()  # type: ignore[index]


def histories(timestamps: np.ndarray) -> Histories:
    """One user with five events, the third of which is context."""
    split = np.array([TRAIN, TRAIN, CONTEXT, TRAIN, TRAIN], np.int8)
    items = np.arange(1, 6, dtype=np.int32)
    return Histories(np.array([0, 0, 5]), items, split, timestamps, ITEMS)


def test_batches_carry_the_times_of_the_history_and_never_the_target_s() -> None:
    held = histories(np.array([10, 20, 30, 40, 50]))
    one, first = np.array([1]), np.array([0])
    trained = module().collator(True)(Rows(held, first, one, first, np.array([5]), 0, 0))
    assert trained.history.tolist() == [[1, 2, 3, 4]]
    assert trained.targets is not None
    assert trained.targets.tolist() == [[2, 0, 4, 5]]
    assert trained.times is not None
    assert trained.times.tolist() == [[10, 20, 30, 40]]
    asked = module().collator(False)(Rows(held, first, one, first, np.array([3]), 0, 0))
    assert asked.times is not None
    assert asked.times.tolist() == [[10, 20, 30]]
    assert module(time_bias=False).collator(False)(
        Rows(held, first, one, first, np.array([3]), 0, 0)
    ).times is None  # fmt: skip


def test_data_without_times_is_refused_or_taken_without_the_bias() -> None:
    flat = histories(np.zeros(5, np.int64))
    assert "set time_bias=false" in str(module(time_bias=True).impossible(flat))
    assert module(time_bias=True).impossible(histories(np.arange(5))) is None
    plain = module(time_bias=False)
    assert plain.impossible(flat) is None
    assert plain.network.packed(HISTORY, LENGTH)[0].shape == (6, 8)
    with pytest.raises(ValueError, match="needs the times"):
        build().packed(HISTORY, LENGTH)


def test_can_tell_histories_apart_by_time_alone() -> None:
    """The same two items; what comes next depends on how long the user paused between them."""
    torch.manual_seed(0)
    network = HSTU(ITEMS, max_length=2, hidden_size=16, dropout=0.0, temperature=None)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    history, length = torch.tensor([[1, 2], [1, 2]]), torch.tensor([2, 2])
    times, targets = torch.tensor([[0, 5], [0, 500_000]]), torch.tensor([3, 4])
    for _ in range(60):
        scores = network.last(history, length, times) @ network.item_vectors()[1:].T
        loss = F.cross_entropy(scores, targets - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_weights_round_trip(tmp_path: Path) -> None:
    first, second = module().eval(), module(learning_rate=0.1).eval()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "best.ckpt")
    second.load_weights(tmp_path / "best.ckpt")
    items = torch.arange(1, ITEMS + 1)
    a, b = (m.score(m.encode(batch()), items) for m in (first, second))
    assert torch.equal(a, b)
    assert not a[2].any()  # an empty history ranks nothing above anything


def test_bf16_autocast_stays_close() -> None:
    network = build(temperature=None)
    with torch.no_grad():
        exact = network.packed(HISTORY, LENGTH, TIMES)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = network.packed(HISTORY, LENGTH, TIMES)[0]
    assert (rounded.float() - exact).abs().max() < 0.15  # of order 1, 8 bits, two blocks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3, "temperature": 0.0}, "num_heads=3 does not.*temperature=0.0 is not"),
        ({"num_items": 0, "num_blocks": 0}, "num_items=0 is below 1; num_blocks=0"),
    ],
)
def test_wrong_settings_are_all_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_a_history_above_max_length_is_refused() -> None:
    with pytest.raises(ValueError, match="keep the last 3 items"):
        build(max_length=3).packed(HISTORY, LENGTH, TIMES)
