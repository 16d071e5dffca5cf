"""BERT4Rec against PyTorch's own encoder layers, and what its masks may and may not depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.loading import TrainDataset, TrainRows
from datamodules.samplers import GlobalBatchSampler
from datamodules.types import CONTEXT, TRAIN, VALID, Batch, Histories, Rows
from lightning_modules.bert4rec import BERT4RecModule
from lightning_modules.bert4rec.collators import ClozeCollator
from lightning_modules.bert4rec.model import BERT4Rec

ITEMS = 20
MASK = ITEMS + 1
HISTORY = torch.tensor([[1, MASK, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
LENGTH = torch.tensor([4, 2, 0])


def build(seed: int = 0, **settings: Any) -> BERT4Rec:
    """A small network whose biases and LayerNorms are random, too, so that no part is a no-op."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {"max_length": 6, "hidden_size": 8, "dropout": 0.0}
    network = BERT4Rec(ITEMS, **(defaults | settings))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        network.item_embedding.weight[0] = 0
    return network.eval()


def derive(network: BERT4Rec, items: list[int], norm_first: bool) -> Tensor:
    """Hidden states (T, d) of one history, with nn.TransformerEncoderLayer."""
    d = network.hidden_size
    x = network.item_embedding.weight[items] + network.position_embedding.weight[: len(items)]
    x = network.embedding_norm(x)[None]
    for block in network.blocks:
        layer = nn.TransformerEncoderLayer(
            d, 2, 4 * d, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True, norm_first=norm_first
        )
        ours = block.state_dict()
        names = {
            "self_attn.in_proj_weight": "attention.in_proj.weight",
            "self_attn.in_proj_bias": "attention.in_proj.bias",
            "self_attn.out_proj.weight": "attention.out_proj.weight",
            "self_attn.out_proj.bias": "attention.out_proj.bias",
            "linear1.weight": "ffn.up.weight", "linear1.bias": "ffn.up.bias",
            "linear2.weight": "ffn.down.weight", "linear2.bias": "ffn.down.bias",
            "norm1.weight": "attention_norm.weight", "norm1.bias": "attention_norm.bias",
            "norm2.weight": "ffn_norm.weight", "norm2.bias": "ffn_norm.bias",
        }  # fmt: skip
        layer.load_state_dict({theirs: ours[mine] for theirs, mine in names.items()})
        x = layer(x)
    states: Tensor = network.final_norm(x[0])
    return states


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_equals_pytorch_s_encoder(norm: str) -> None:
    network = build(norm=norm)
    states, layout = network.packed(HISTORY, LENGTH)
    grid = layout.pad(states)
    for row, n in enumerate(LENGTH.tolist()[:2]):
        expected = derive(network, HISTORY[row, :n].tolist(), norm == "pre")
        torch.testing.assert_close(grid[row, :n], expected, atol=1e-5, rtol=1e-4)


def test_scores_are_the_paper_s_output_layer() -> None:
    network = build()
    states, _ = network.packed(HISTORY, LENGTH)
    scores = network.output(states) @ network.item_vectors().T  # (N, I + 1)
    x = F.gelu(states @ network.head.weight.T + network.head.bias)
    x = F.layer_norm(x, (8,), network.head_norm.weight, network.head_norm.bias, 1e-12)
    expected = x @ network.item_embedding.weight[: ITEMS + 1].T + network.item_bias
    torch.testing.assert_close(scores, expected)


def test_the_next_item_is_asked_for_after_the_newest_event() -> None:
    network = build()
    found = network.next(HISTORY, LENGTH)
    for row, n in enumerate(LENGTH.tolist()):
        asked = torch.tensor([[*HISTORY[row, :n].tolist(), MASK]])
        states, _ = network.packed(asked, torch.tensor([n + 1]))
        torch.testing.assert_close(found[row], network.output(states)[-1], atol=1e-5, rtol=1e-4)
    wide = F.pad(HISTORY, (0, 1))  # as wide as max_length: the [MASK] still fits
    torch.testing.assert_close(network.next(wide, LENGTH), found)


def test_padding_matters_nowhere_and_both_sides_matter() -> None:
    network = build()
    before, layout = network.packed(HISTORY, LENGTH)
    filled = HISTORY.clone()
    filled[1, 2:] = 9
    torch.testing.assert_close(network.packed(filled, LENGTH)[0], before)
    later = HISTORY.clone()
    later[0, 3] = 9  # a later item does change an earlier state
    changed = layout.pad(network.packed(later, LENGTH)[0])
    assert not torch.allclose(changed[0, 0], layout.pad(before)[0, 0], atol=1e-4)


def histories(lengths: list[int], split: int = TRAIN) -> Histories:
    """Users 1, 2, .. with so many events each; items walk through the catalogue."""
    total = sum(lengths)
    offsets = np.cumsum([0, 0, *lengths])
    items = (np.arange(total) % ITEMS + 1).astype(np.int32)
    return Histories(
        offsets, items, np.full(total, split, np.int8), np.zeros(total, np.int64), ITEMS
    )


def rows(held: Histories, max_length: int, epoch: int = 0, seed: int = 0) -> Rows:
    """All windows of all users."""
    table = TrainRows(held, max_length, all_windows=True, sequential=False)
    row = np.arange(len(table.user))
    filler = np.zeros(len(row), bool)
    normaliser = float(table.target_counts.sum())
    return Rows(
        held, row, table.user, table.start, table.stop, epoch, seed, filler, normaliser
    )  # fmt: skip


def hidden_events(made: Rows, batch: Batch, max_length: int) -> set[tuple[int, int]]:
    """(user, index in the data) of each hidden event, checked against the data."""
    assert batch.targets is not None
    found = set()
    for b, t in batch.targets.nonzero().tolist():
        event = int(made.stop[b] - batch.length[b]) + t
        assert batch.targets[b, t] == made.histories.items[event]
        assert batch.history[b, t] == MASK
        found.add((int(made.user[b]), event))
    visible = batch.history[(batch.targets == 0) & (batch.history > 0)]
    assert (visible <= ITEMS).all()
    return found


def test_masks_do_not_depend_on_the_batch_but_on_seed_and_epoch() -> None:
    held = histories([30, 3, 17, 1])
    collate = ClozeCollator(8, 0.3, 0.2)
    whole = rows(held, 8)
    together = hidden_events(whole, collate(whole), 8)
    alone: set[tuple[int, int]] = set()
    for b in range(len(whole.row)):
        one = replace(
            whole, row=whole.row[[b]], user=whole.user[[b]], start=whole.start[[b]],
            stop=whole.stop[[b]], filler=np.zeros(1, bool),
        )  # fmt: skip
        alone |= hidden_events(one, collate(one), 8)
    assert alone == together
    assert {user for user, _ in together} == {1, 2, 3, 4}
    for other in (rows(held, 8, epoch=1), rows(held, 8, seed=1)):
        assert hidden_events(other, collate(other), 8) != together


def test_shares_of_hidden_events() -> None:
    held = histories([20] * 2_000)
    made = rows(held, 20)
    cloze = ClozeCollator(20, 0.3, 0.0)(made)
    assert cloze.targets is not None
    # 40,000 draws; a window without one (0.7**20 < 0.001) gets one more. 4 deviations are 0.009.
    assert (cloze.targets > 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    columns = (cloze.targets > 0).float().mean(0)
    assert (columns - 0.3).abs().max() < 0.05
    assert cloze.normaliser is not None
    assert cloze.normaliser.item() == pytest.approx(0.3 * 40_000)
    last = ClozeCollator(20, 0.3, 1.0)(made)
    assert last.targets is not None
    assert (last.targets[:, :-1] == 0).all()
    assert (last.targets[:, -1] > 0).all()
    some = ClozeCollator(20, 0.3, 0.25)(made)
    assert some.targets is not None
    share = ((some.targets > 0).sum(1) == 1).float().mean().item()
    assert share == pytest.approx(0.25 + 0.75 * 0.0068, abs=0.04)  # 20 * 0.3 * 0.7**19 = 0.0068


def test_only_training_events_are_hidden_and_one_always_is() -> None:
    held = histories([6, 6])
    held.split[[1, 4, 8, 9, 10]] = CONTEXT
    held.split[[5, 11]] = VALID  # never in a window: it ends with the newest training event
    for epoch in range(30):
        for last_only in (0.0, 1.0):
            made = rows(held, 4, epoch)
            batch = ClozeCollator(4, 0.05, last_only)(made)
            events = {event for _, event in hidden_events(made, batch, 4)}
            assert all(held.split[event] == TRAIN for event in events)
            assert batch.targets is not None
            assert (batch.targets > 0).any(1).all()
            assert not (batch.history == int(held.items[5])).any()
            if last_only:
                assert events == {3, 7}


def test_moved_windows_end_anywhere_but_together() -> None:
    held = histories([20] * 2_000 + [2, 1])
    made = rows(held, 8)  # three windows for each user of 20 events
    plain, moved, half = (ClozeCollator(8, 0.3, 0.0, share) for share in (0.0, 1.0, 0.5))
    assert not plain._distance(made).any()
    far = moved._distance(made)
    long = made.stop - made.start > 8
    assert np.bincount(far[long], minlength=8)[0] == 0
    # 4,000 rows of 2,000 users over 7 distances; 4 deviations of a share are 0.032.
    assert np.bincount(far[long], minlength=8)[1:] / long.sum() == pytest.approx(1 / 7, abs=0.035)
    assert (made.stop - far > made.start).all(), "one event is left"
    for user in (1, 7):
        assert len(set(far[(made.user == user) & long].tolist())) == 1
    assert (half._distance(made)[long] > 0).mean() == pytest.approx(0.5, abs=0.05)
    again = moved._distance(replace(made, epoch=1))
    assert (again != far).mean() > 0.5
    batch = moved(made)
    first = np.flatnonzero(long)[0]
    newest = held.items[made.stop[first] - far[first] - 1]
    target = batch.targets[first, -1] if batch.targets is not None else 0
    assert max(int(batch.history[first, -1]) % MASK, int(target)) == newest
    assert batch.targets is not None
    assert (batch.targets > 0).any(1).all()


def test_filler_rows_hide_nothing() -> None:
    made = rows(histories([5, 6]), 8)
    batch = ClozeCollator(8, 0.5, 0.5)(replace(made, filler=np.array([False, True])))
    assert batch.targets is not None
    assert batch.targets[0].any()
    assert not batch.targets[1].any()
    assert not (batch.history[1] == MASK).any()


def module(**settings: Any) -> BERT4RecModule:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"max_length": 8, "hidden_size": 8, "dropout": 0.0}
    made = BERT4RecModule(num_items=ITEMS, **(defaults | settings))
    made.log = lambda *a, **k: None  # type: ignore[method-assign]
    made._trainer = SimpleNamespace(precision="32-true")  # type: ignore[assignment]
    return made


def test_the_loss_is_cross_entropy_at_hidden_positions() -> None:
    made = module()
    batch = made.collator(True)(rows(histories([8, 5, 1]), 8))
    loss = made.training_step(batch, 0)
    assert batch.targets is not None
    states, layout = made.network.packed(batch.history, batch.length)
    where = batch.targets > 0
    out = made.network.output(layout.pad(states)[where])
    logits = out[:, :-1] @ made.network.item_embedding.weight[1:-1].T + made.network.item_bias[1:]
    total = F.cross_entropy(logits, batch.targets[where] - 1, reduction="sum")
    torch.testing.assert_close(loss, total / (0.2 * 14))
    loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    table = made.network.item_embedding.weight.grad
    assert table is not None
    assert not table[0].any()
    assert table[MASK].any()


@pytest.mark.parametrize(("ranks", "micro"), [(2, 1), (3, 2)])
def test_devices_and_micro_batches_add_up_to_one(ranks: int, micro: int) -> None:
    table = TrainRows(histories([9, 4, 2, 7, 1]), 5, all_windows=True, sequential=False)
    lengths = np.minimum(table.stop - table.start, 5)
    dataset = TrainDataset(table, seed=3)

    def gradients(world: int, parts: int) -> list[Tensor]:
        made = module(max_length=5)
        collate = made.collator(True)
        for rank in range(world):
            sampler = GlobalBatchSampler(
                lengths, 100, rank=rank, world_size=world, micro_batches=parts,
                target_counts=table.target_counts,
            )  # fmt: skip
            for part in sampler:
                loss = made.training_step(collate(dataset[part]), 0)
                (loss / (world * parts)).backward()  # type: ignore[no-untyped-call]
        return [p.grad for p in made.parameters() if p.grad is not None]

    for one, many in zip(gradients(1, 1), gradients(ranks, micro), strict=True):
        torch.testing.assert_close(one, many, atol=1e-6, rtol=1e-4)


def test_evaluation_keeps_room_for_the_mask_and_takes_an_empty_history() -> None:
    made = module(max_length=4).eval()
    held = histories([9])
    one, zero = np.array([1, 1]), np.array([0, 0])
    batch = made.collator(False)(Rows(held, zero, one, zero, np.array([8, 0]), 0, 0))
    assert batch.history.tolist() == [[6, 7, 8], [0, 0, 0]]
    scores = made.score(made.encode(batch), torch.arange(1, ITEMS + 1))
    assert scores.shape == (2, ITEMS)
    assert torch.isfinite(scores).all()
    lists = torch.tensor([[3, 9], [1, 1]])
    torch.testing.assert_close(made.score(made.encode(batch), lists), scores.gather(1, lists - 1))


def test_can_learn_what_each_user_repeats() -> None:
    made = module(max_length=6, hidden_size=16)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    liked = torch.arange(1, ITEMS + 1)
    held = replace(histories([6] * ITEMS), items=np.repeat(liked.numpy(), 6).astype(np.int32))
    for epoch in range(60):
        loss = made.training_step(made.collator(True)(rows(held, 6, epoch)), 0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    asked = Batch(liked - 1, liked, liked[:, None].expand(-1, 5), torch.full((ITEMS,), 5))
    best = made.score(made.encode(asked), liked).argmax(1) + 1
    assert torch.equal(best, liked)


def test_weights_round_trip(tmp_path: Path) -> None:
    first, second = module(), module()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "best.ckpt")
    second.load_weights(tmp_path / "best.ckpt")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="mask_probability=0"):
        module(mask_probability=0.0)
    with pytest.raises(ValueError, match=r"max_length=1 has no room.*num_heads=3 does not divide"):
        build(max_length=1, num_heads=3)
    with pytest.raises(ValueError, match="norm='batch'"):
        build(norm="batch")
    with pytest.raises(ValueError, match="max_length=3, which counts"):
        build(max_length=3).packed(HISTORY, LENGTH)
