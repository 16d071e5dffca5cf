"""SASRec against an independent re-derivation, and the properties that its training relies on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.sasrec.layers import Block, Layout
from lightning_modules.sasrec.model import SASRec

NORMS = ["pre", "post", "original", "query"]
POSITIONS = ["learned", "reversed", "none"]
ITEMS = 30


def build(seed: int = 0, **settings: Any) -> SASRec:
    """A small model whose biases and LayerNorms are random too, so that no part is a no-op."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "num_items": ITEMS, "max_length": 12, "hidden_size": 8, "num_blocks": 2, "num_heads": 2,
        "dropout": 0.0,
    }  # fmt: skip
    model = SASRec(**(defaults | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def padded(lengths: list[int], width: int, seed: int = 0, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Random histories (B, T) padded on the right with ``fill``, and their lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor(lengths)
    history = torch.randint(1, ITEMS + 1, (len(lengths), max(lengths)), generator=generator)
    history = F.pad(history, (0, width - history.shape[1]))
    history[torch.arange(width) >= length[:, None]] = fill
    return history, length


def derive(model: SASRec, items: list[int], norm: str, positions: str) -> Tensor:
    """Hidden states (T, d) of one history, by the published equations and nn.MultiheadAttention."""
    d = model.hidden_size
    rows = []
    for t, item in enumerate(items):
        row = model.item_embedding.weight[item] * math.sqrt(d)
        if positions != "none":
            assert model.position_embedding is not None
            place = t if positions == "learned" else len(items) - 1 - t
            row = row + model.position_embedding.weight[place]
        rows.append(row)
    x = torch.stack(rows)  # (T, d)
    future = torch.ones(len(items), len(items), dtype=torch.bool).triu(1)  # True = not allowed

    for block in model.blocks:
        assert isinstance(block, Block)
        attention = nn.MultiheadAttention(d, block.attention.num_heads, batch_first=True)
        attention.load_state_dict(
            {
                "in_proj_weight": block.attention.in_proj.weight,
                "in_proj_bias": block.attention.in_proj.bias,
                "out_proj.weight": block.attention.out_proj.weight,
                "out_proj.bias": block.attention.out_proj.bias,
            }
        )

        def attend(query: Tensor, memory: Tensor, by: nn.MultiheadAttention = attention) -> Tensor:
            q, m = query[None], memory[None]
            return by(q, m, m, attn_mask=future, need_weights=False)[0][0]

        def ffn(y: Tensor, of: Block = block) -> Tensor:
            hidden = torch.relu(y @ of.ffn.up.weight.T + of.ffn.up.bias)
            return hidden @ of.ffn.down.weight.T + of.ffn.down.bias

        first, second = block.attention_norm, block.ffn_norm
        if norm == "pre":
            x = x + attend(first(x), first(x))
            x = x + ffn(second(x))
        elif norm == "post":
            x = first(x + attend(x, x))
            x = second(x + ffn(x))
        else:
            start = first(x) if norm == "original" else x
            x = start + attend(first(x), x)
            x = second(x) + ffn(second(x))
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    final = model.final_norm
    assert isinstance(final, nn.LayerNorm)
    return (x - mean) / (variance + final.eps).sqrt() * final.weight + final.bias


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_equals_an_independent_derivation(norm: str, positions: str) -> None:
    model = build(norm=norm, positions=positions)
    history, length = padded([7, 1, 12, 4], width=12)
    with torch.no_grad():
        states = model(history, length)
        for row, n in enumerate(length.tolist()):
            expected = derive(model, history[row, :n].tolist(), norm, positions)
            torch.testing.assert_close(states[row, :n], expected, atol=1e-5, rtol=1e-4)
            assert not states[row, n:].any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_later_item_does_not_change_earlier_states(norm: str) -> None:
    model = build(norm=norm)
    history, length = padded([10, 10], width=10)
    changed = history.clone()
    changed[:, 6] = history[:, 6] % ITEMS + 1
    with torch.no_grad():
        before, after = model(history, length), model(changed, length)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-4  # and every later one moves


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=5).filter(any),
    extra=st.integers(0, 4),
    fill=st.integers(0, ITEMS),
    norm=st.sampled_from(NORMS),
    positions=st.sampled_from(POSITIONS),
)
def test_padding_never_matters(
    lengths: list[int], extra: int, fill: int, norm: str, positions: str
) -> None:
    model = build(norm=norm, positions=positions)
    tight, length = padded(lengths, width=max(lengths))
    loose, _ = padded(lengths, width=max(lengths) + extra, fill=fill)
    with torch.no_grad():
        expected, states = model(tight, length), model(loose, length)
    torch.testing.assert_close(states[:, : max(lengths)], expected, atol=1e-5, rtol=1e-4)
    assert not states[:, max(lengths) :].any()


def test_reversed_positions_are_a_left_padded_codes_absolute_index() -> None:
    model = build(positions="reversed", num_blocks=0, final_norm=False)
    history, length = padded([3, 5], width=5)
    with torch.no_grad():
        states = model(history, length)
        place = states - math.sqrt(8) * model.item_embedding(history)
    table = model.position_embedding
    assert table is not None
    # Left-padded to five, both rows' newest items share the last column.
    torch.testing.assert_close(place[0, :3], table.weight[[2, 1, 0]])
    torch.testing.assert_close(place[1], table.weight[[4, 3, 2, 1, 0]])


def test_last_and_packed_agree_with_forward() -> None:
    model = build()
    history, length = padded([5, 0, 9, 1], width=9)
    with torch.no_grad():
        states, (real, layout) = model(history, length), model.packed(history, length)
        newest = model.last(history, length)
    torch.testing.assert_close(real, torch.cat([states[0, :5], states[2, :9], states[3, :1]]))
    torch.testing.assert_close(layout.pack(history), history[history > 0])
    torch.testing.assert_close(
        newest, torch.stack([states[0, 4], torch.zeros(8), states[2, 8], states[3, 0]])
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("lengths", [[5, 0, 12, 1], [4, 4], [0, 0]])
def test_in_evaluation_the_last_block_is_asked_for_the_newest_alone(
    norm: str, blocks: int, lengths: list[int]
) -> None:
    model = build(norm=norm, num_blocks=blocks)
    history, length = padded(lengths, max(*lengths, 1))
    with torch.no_grad():
        short, whole = model.last(history, length), model.train().last(history, length)
    torch.testing.assert_close(short, whole)
    assert not short[length == 0].any()


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [0, 3]])
def test_empty_histories_are_finite_forward_and_backward(lengths: list[int]) -> None:
    model = build().train()
    history, length = padded(lengths, width=4)
    loss = model(history, length).sum() + model.last(history, length).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6), extra=st.integers(0, 3))
def test_pack_undoes_pad(lengths: list[int], extra: int) -> None:
    width = max(lengths) + extra
    layout = Layout.of(torch.tensor(lengths), width)
    packed = torch.arange(1, sum(lengths) + 1)
    grid = layout.pad(packed)
    assert grid.shape == (len(lengths), width)
    assert [int(row.count_nonzero()) for row in grid] == lengths
    torch.testing.assert_close(layout.pack(grid), packed)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", ["learned", "reversed"])
def test_every_parameter_gets_gradient(norm: str, positions: str) -> None:
    model = build(norm=norm, positions=positions, max_length=9, dropout=0.1).train()
    history, length = padded([9, 6], width=9)
    states, layout = model.packed(history, length)
    scores = states @ model.item_vectors()[1:].T  # (N, I)
    F.cross_entropy(scores, layout.pack(history) - 1).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_padding_row_stays_zero_in_training() -> None:
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    history, length = padded([6, 2], width=8)
    before = model.item_vectors().detach().clone()
    for _ in range(3):
        states, layout = model.packed(history, length)
        scores = states @ model.item_vectors().T  # (N, I+1)
        blocked = scores.index_fill(1, torch.tensor([0]), -torch.inf)
        loss = F.cross_entropy(blocked, layout.pack(history))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not model.item_vectors()[0].any()
    assert (model.item_vectors()[1:] != before[1:]).any(dim=1).all()


def test_can_learn_a_cycle() -> None:
    torch.manual_seed(0)
    model = SASRec(ITEMS, max_length=8, hidden_size=16, dropout=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    start = torch.arange(ITEMS)[:, None]
    events = (start + torch.arange(9)) % ITEMS + 1  # every history walks 1, 2, .., I, 1, ..
    length = torch.full((ITEMS,), 8)
    for _ in range(60):
        scores = model.packed(events[:, :-1], length)[0] @ model.item_vectors()[1:].T
        loss = F.cross_entropy(scores, events[:, 1:].flatten() - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        best = (model.last(events[:, :-1], length) @ model.item_vectors()[1:].T).argmax(1) + 1
    assert torch.equal(best, events[:, -1])


@pytest.mark.parametrize("norm", NORMS)
def test_bf16_autocast_stays_close(norm: str) -> None:
    model = build(norm=norm)
    history, length = padded([7, 3, 0], width=9)
    with torch.no_grad():
        exact = model(history, length)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = model(history, length)
    assert torch.isfinite(states).all()
    # LayerNormed states are of order 1; bf16 keeps 8 bits, and errors add up over two blocks.
    assert (states.float() - exact).abs().max() < 0.15
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(history, length).float().square().mean()
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_residual_dropout_is_on_what_attention_gives() -> None:
    """With weights that attend to nothing but a bias, all that can be dropped is attention's output."""
    model = build(num_blocks=1, dropout=0.0, residual_dropout=0.999, norm="query")
    whole = build(num_blocks=1, dropout=0.0, residual_dropout=0.0, norm="query")
    history, length = padded([9, 9], width=9)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(model.eval()(history, length), whole.eval()(history, length))
        dropped, kept = model.train()(history, length), whole.train()(history, length)
        assert torch.equal(kept, whole.eval()(history, length))
        (block,) = model.blocks
        assert isinstance(block, Block)
        block.attention.out_proj.weight.zero_()
        block.attention.out_proj.bias.zero_()
        without = model.eval()(history, length)
    same = (dropped - without).abs().amax(-1) < 1e-5
    assert same.float().mean() > 0.9  # 0.999 ** 8 of the positions keep nothing of eight numbers
    assert not torch.allclose(dropped, kept)


def test_dropout_only_acts_in_training() -> None:
    model = build(dropout=0.5)
    history, length = padded([8, 8], width=8)
    torch.testing.assert_close(model(history, length), model(history, length))
    model.train()
    assert not torch.equal(model(history, length), model(history, length))


@pytest.mark.parametrize(("how", "std"), [("truncated", 0.02), ("xavier", None)])
def test_initialisation(how: str, std: float | None) -> None:
    torch.manual_seed(0)
    model = SASRec(4000, hidden_size=64, initialisation=how)  # type: ignore[arg-type]
    table = model.item_vectors()
    # Truncation at two deviations leaves sqrt(1 - 4 phi(2) / erf(sqrt 2)) = 0.880 of the deviation.
    expected = 0.880 * std if std else math.sqrt(2 / (4001 + 64))
    assert not table[0].any()
    assert table[1:].std().item() == pytest.approx(expected, rel=0.02)
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))


def test_embedding_scale_and_position_count() -> None:
    plain = build(scale_embedding=False, positions="none", num_blocks=0, final_norm=False)
    history, length = padded([5], width=5)
    torch.testing.assert_close(plain(history, length), plain.item_embedding(history))
    scaled = build(positions="none", num_blocks=0, final_norm=False)
    torch.testing.assert_close(
        scaled(history, length), math.sqrt(8) * scaled.item_embedding(history)
    )
    assert plain.position_embedding is None


def test_a_history_above_max_length_is_refused() -> None:
    history, length = padded([13], width=13)
    with pytest.raises(ValueError, match="keep the last 12 items"):
        build()(history, length)
    assert build(positions="none")(history, length).shape == (1, 13, 8)  # nothing limits this one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batch", "positions": "rope"}, "norm='batch'.*positions='rope'"),
        ({"hidden_size": 8, "num_heads": 3}, "num_heads=3 does not divide hidden_size=8"),
        ({"num_items": 0, "max_length": 0}, "num_items=0, max_length=0"),
    ],
)
def test_wrong_settings_are_all_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)
