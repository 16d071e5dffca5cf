"""NextItNet against convolutions written as loops, and the properties that its training relies on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules.nextitnet import NextItNetModule
from lightning_modules.nextitnet.model import CausalConvolution
from tests.lightning_modules.reloading import require_same_scores

ITEMS, D = 9, 6
HISTORY = torch.tensor([[1, 2, 3, 4, 7, 8], [5, 6, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
LENGTH = torch.tensor([6, 3, 0])
TARGETS = torch.tensor([[2, 3, 0, 5, 8, 1], [0, 7, 9, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


def build(seed: int = 0, **settings: Any) -> NextItNetModule:
    """A small module whose biases and norms are random, so that no part of it is a no-op."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "max_length": 6, "hidden_size": D, "kernel_size": 2, "dilations": [1, 2], "dropout": 0
    }  # fmt: skip
    module = NextItNetModule(ITEMS, **(defaults | settings))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    module._trainer = type("T", (), {"precision": "32-true"})()
    return module


def batch(history: Tensor = HISTORY) -> Batch:
    rows = torch.arange(len(history))
    return Batch(
        rows, rows + 1, history, LENGTH, targets=TARGETS, normaliser=torch.tensor(4.0)
    )  # fmt: skip


def convolve(layer: CausalConvolution, x: Tensor, dilation: int) -> Tensor:
    """(T, d) -> (T, d), one product at a time; the newest tap is the kernel's last."""
    weight, bias = layer.convolution.weight, layer.convolution.bias
    assert bias is not None
    taps = weight.shape[2]
    rows = []
    for t in range(len(x)):
        row = bias.clone()
        for k in range(taps):
            place = t - (taps - 1 - k) * dilation
            if place >= 0:
                row = row + weight[:, :, k] @ x[place]
        rows.append(row)
    return torch.stack(rows)


def normalise(x: Tensor, norm: Any) -> Tensor:
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    scaled: Tensor = (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    return scaled


def derive(module: NextItNetModule, items: list[int], dilations: list[int]) -> Tensor:
    """States (T, d) of one history, by the paper's residual block (b)."""
    network = module.network
    x = network.item_embedding.weight[items] * math.sqrt(D)
    for block, dilation in zip(network.blocks, dilations, strict=True):
        y: Any = block
        first = normalise(convolve(y.first, x, dilation), y.first_norm).clamp(min=0)
        second = normalise(convolve(y.second, first, 2 * dilation), y.second_norm).clamp(min=0)
        x = x + second
    return x @ network.output.weight.T + network.output.bias


@pytest.mark.parametrize(
    ("taps", "dilations"), [(2, [1, 2]), (3, [1]), (1, [1, 1]), (3, [4, 1, 4])]
)
def test_equals_an_independent_derivation(taps: int, dilations: list[int]) -> None:
    module = build(kernel_size=taps, dilations=dilations).eval()
    with torch.no_grad():
        states = module.states(batch(), HISTORY > 0)  # (N, d)
        long, short = (derive(module, r, dilations) for r in ([1, 2, 3, 4, 7, 8], [5, 6, 2]))
        torch.testing.assert_close(states, torch.cat([long, short]), atol=1e-5, rtol=1e-4)
        users = torch.stack([long[-1], short[-1], torch.zeros(D)])
        torch.testing.assert_close(module.user_vectors(batch()), users, atol=1e-5, rtol=1e-4)


def test_neither_later_items_nor_padding_change_a_state() -> None:
    module = build().eval()
    changed = HISTORY.clone()
    changed[0, 3] = 9
    filled = F.pad(HISTORY, (0, 3))
    filled[1, 3:] = 8
    with torch.no_grad():
        before, after = module.network(HISTORY), module.network(changed)
        assert torch.equal(after[0, :3], before[0, :3])
        assert (after[0, 3:] - before[0, 3:]).abs().amax(1).min() > 1e-4
        torch.testing.assert_close(module.network(filled)[0, :6], before[0])
        torch.testing.assert_close(module.user_vectors(batch(filled)), module.user_vectors(batch()))


@pytest.mark.parametrize(("taps", "dilations"), [(2, [1, 2]), (3, [1, 4])])
def test_the_receptive_field_is_what_a_state_reads(taps: int, dilations: list[int]) -> None:
    network = build(kernel_size=taps, dilations=dilations, hidden_size=16).network.eval()
    field = network.receptive_field
    assert field == 1 + sum(3 * (taps - 1) * d for d in dilations)
    history = torch.randint(1, ITEMS + 1, (1, field + 3))
    x = network.item_embedding(history).detach().requires_grad_()
    y = x * network.input_scale
    for block in network.blocks:
        y = block(y)
    (gradient,) = torch.autograd.grad(network.output(y)[0, -1].sum(), x)
    reads = gradient[0].abs().amax(1) > 0  # (T,)
    assert not reads[:3].any()  # the three items before the field
    assert reads[3]
    assert reads[-1]


def test_loss_is_cross_entropy_and_reaches_every_parameter() -> None:
    module = build()
    loss = module.training_step(batch(), 0)
    logits = module.network(HISTORY)[TARGETS > 0] @ module.item_vectors()[1:].T  # (N, I)
    expected = F.cross_entropy(logits, TARGETS[TARGETS > 0] - 1, reduction="sum") / 4
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    table = module.item_vectors()
    assert not table[0].any()
    assert not table.grad[0].any()  # type: ignore[index]


def test_dropout_follows_the_seed_and_only_acts_in_training() -> None:
    module = build(dropout=0.5)

    def states() -> Tensor:
        torch.manual_seed(3)
        drawn: Tensor = module.network(HISTORY)
        return drawn

    torch.testing.assert_close(states(), states())
    assert not torch.equal(states(), module.network(HISTORY))
    module.eval()
    torch.testing.assert_close(module.network(HISTORY), build().network(HISTORY))


def test_weights_round_trip(tmp_path: Path) -> None:
    scores = require_same_scores(build(0), build(1), batch(), ITEMS, tmp_path)
    assert not scores[2].any()  # an empty history ranks nothing above anything


def test_can_learn_a_cycle() -> None:
    module = build(hidden_size=16)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    events = (torch.arange(ITEMS)[:, None] + torch.arange(5)) % ITEMS + 1  # 1, 2, .., I, 1, ..
    for _ in range(60):
        scores = module.network(events[:, :-1]) @ module.item_vectors()[1:].T
        optimizer.zero_grad()
        F.cross_entropy(scores.flatten(0, 1), events[:, 1:].flatten() - 1).backward()
        optimizer.step()
    assert torch.equal(scores.argmax(2) + 1, events[:, 1:])


@pytest.mark.parametrize("wrong", [{"kernel_size": 0}, {"dilations": []}, {"dilations": [1, 0]}])
def test_wrong_sizes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1 and one dilation or more"):
        build(**wrong)
