"""RECFORMER: its tokens one after the other, its losses by hand, its two phases, what is cut off."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import CATALOG_SCHEMA, TEST, TRAIN, VALID, Batch, Histories, Rows
from lightning_modules.a_llmrec import Stage1Module
from lightning_modules.id_batches import OneTargetCollator
from lightning_modules.llm import SentenceEncoderSpec
from lightning_modules.recformer import RecformerModule, RecformerPretrainingModule
from lightning_modules.recformer.model import Recformer
from lightning_modules.recformer.tokens import ItemTokens
from tests.lightning_modules.reloading import require_same_scores
from tests.lightning_modules.tiny_bert import LONGEST, write_tiny_bert

ITEMS = 5
CATALOG = pl.DataFrame(
    {
        "item_id": list("abcde"), "title": ["up", "jaws", None, "alien", "m"], "description": [None] * ITEMS,
        "categories": [["x", "y"], None, None, ["z"], None], "brand": [None] * ITEMS, "price": [None] * ITEMS,
        "images": [None] * ITEMS,
    },
    schema=CATALOG_SCHEMA,
)  # fmt: skip
FIELDS = ("title", "categories")
HISTORY = torch.tensor([[1, 2, 3], [4, 5, 0], [0, 0, 0]])
LENGTH = torch.tensor([3, 2, 0])
TARGETS = torch.tensor([[0, 0, 4], [0, 2, 0], [0, 0, 0]])


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoderSpec:
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"), dropout=0.0)
    return SentenceEncoderSpec(str(folder), max_length=LONGEST)


def attached(module: Any, step: int = 3) -> Any:
    """As a trainer of one CPU would."""
    items = np.array([1, 1, 2, 3, 4, 4, 4, 5], np.int32)
    histories = Histories(np.array([0, 0, 8]), items, np.zeros(8, np.int8), np.arange(8), ITEMS)
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), global_step=step, precision="32-true",
        datamodule=SimpleNamespace(seed=0, histories=histories), estimated_stepping_batches=10,
    )  # fmt: skip
    module.log = lambda *_, **__: None
    module.setup("fit")
    return module


def built(spec: SentenceEncoderSpec, kind: Any = RecformerModule, **options: Any) -> Any:
    given = {"fields": FIELDS, "attribute_tokens": 9, "max_length": 3, "chunk_size": 2}
    return kind(ITEMS, CATALOG, spec, **(given | options))


def ready(spec: SentenceEncoderSpec, kind: Any = RecformerModule, **options: Any) -> Any:
    return attached(built(spec, kind, **options))


def batch(rows: slice = slice(None), normaliser: float = 2.0) -> Batch:
    number = torch.arange(3)[rows]
    return Batch(
        number, number + 1, HISTORY[rows], LENGTH[rows], targets=TARGETS[rows],
        normaliser=torch.tensor(normaliser),
    )  # fmt: skip


def words(module: Any, item: int) -> list[tuple[int, int]]:
    """(token, type) of an item: "key value" of what it has, 9 tokens an attribute."""
    row = CATALOG.row(item - 1, named=True)
    found = []
    for field in FIELDS:
        value = row[field] if isinstance(row[field], str) else ", ".join(row[field] or [])
        if value:
            parts = [(field, 1), (value, 2)]
            found += [
                (token, kind)
                for text, kind in parts
                for token in module.tokenizer(text, add_special_tokens=False)["input_ids"]
            ][:9]
    return found


def by_hand(module: Any, newest_first: list[int]) -> Tensor:
    """The [CLS] state (d,) of one sequence, its embeddings added up one by one."""
    network, tokens = module.network, [(module.tokenizer.cls_token_id, 0, 0)]
    for place, item in enumerate(newest_first, start=1):
        tokens += [(token, kind, place) for token, kind in words(module, item)]
    table = network.encoder.get_input_embeddings().weight
    x = torch.stack([
        table[token] + network.token_types.weight[kind] + network.item_positions.weight[place]
        for token, kind, place in tokens[:LONGEST]
    ])  # fmt: skip
    state = network.encoder(inputs_embeds=x[None]).last_hidden_state[0, 0]
    return state / state.norm()


# ---------------------------------------------------------------- tokens


def test_tokens_of_a_history_are_its_items_newest_first(spec: SentenceEncoderSpec) -> None:
    module = ready(spec)
    assert [len(words(module, i)) for i in (1, 2, 3, 4, 5)] == [16, 9, 0, 18, 6]
    tokens = module.history_tokens(batch())
    for row, newest_first in enumerate([[3, 2, 1], [5, 4], []]):
        expected = [(module.tokenizer.cls_token_id, 0, 0)]
        for place, item in enumerate(newest_first, start=1):
            expected += [(*word, place) for word in words(module, item)]
        real = tokens.mask[row]
        cells = (t[row][real].tolist() for t in (tokens.ids, tokens.types, tokens.items))
        found = zip(*cells, strict=True)
        assert list(found) == expected
    assert not tokens.cut.any()
    assert module.remarks() == []


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, ITEMS), min_size=0, max_size=6), min_size=1, max_size=4),
    limit=st.integers(2, 40),
)
def test_what_is_too_long_loses_its_oldest_tokens(
    spec: SentenceEncoderSpec, rows: list[list[int]], limit: int
) -> None:
    module = ready(spec)
    made: ItemTokens = module.item_tokens
    items = torch.zeros(len(rows), 6, dtype=torch.long)
    for row, ids in enumerate(rows):
        items[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    tokens = made(items, limit)
    for row, ids in enumerate(rows):
        whole = [made.cls] + [token for i in ids for token, _ in words(module, i)]
        assert tokens.ids[row][tokens.mask[row]].tolist() == whole[:limit]
        assert bool(tokens.cut[row]) == (len(whole) > limit)
    assert (tokens.ids[~tokens.mask] == made.pad).all()


def test_what_was_cut_is_told(spec: SentenceEncoderSpec) -> None:
    short = SentenceEncoderSpec(spec.source, max_length=20)
    module = ready(short).eval()
    with torch.no_grad():
        module.user_vectors(batch())
        module.user_vectors(batch(slice(1, 2)))
    # 1 + 0 + 9 + 16 tokens, 1 + 6 + 18 twice, and 1.
    assert module.remarks() == ["3 of 4 histories lost their oldest tokens: the encoder reads 20"]


# ---------------------------------------------------------------- vectors and scores


def test_vectors_are_those_of_each_sequence_alone(spec: SentenceEncoderSpec) -> None:
    module = ready(spec).eval()
    with torch.no_grad():
        users, table = module.user_vectors(batch()), module.item_vectors()
        expected = torch.stack([by_hand(module, [3, 2, 1]), by_hand(module, [5, 4])]) / 0.05
        torch.testing.assert_close(users[:2], expected, atol=1e-4, rtol=1e-4)
        assert not users[2].any()
        items = torch.stack([by_hand(module, [i]) for i in range(1, ITEMS + 1)])
        torch.testing.assert_close(table[1:], items, atol=1e-5, rtol=1e-4)
        assert not table[0].any()
        scores = module.score(users, torch.tensor([1, 4]))
        cosine = F.cosine_similarity(expected[:, None], items[[0, 3]][None], dim=-1) / 0.05
        torch.testing.assert_close(scores[:2], cosine, atol=1e-3, rtol=1e-4)


def test_longformer_attends_globally_at_cls_and_locally_elsewhere() -> None:
    """A token beyond all windows reaches [CLS], but not another token's state in one layer."""
    from transformers import LongformerConfig, LongformerModel

    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=70, attention_window=32, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    network = Recformer(LongformerModel(config), max_items=3, window=4).eval()
    length = 24
    ids = torch.randint(1, 20, (1, length))
    other = ids.clone()
    other[0, -1] = ids[0, -1] % 19 + 1
    ones = torch.ones(1, length, dtype=torch.long)
    tokens = SimpleNamespace(
        ids=ids, types=ones, items=ones, mask=ones.bool(), cut=torch.tensor([False])
    )
    with torch.no_grad():
        before, after = network.states(tokens), network.states(tokens, other)  # type: ignore[arg-type]
    moved = (before - after).abs().amax(2)[0] > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [0, 21, 22, 23]  # [CLS], and two tokens each way


# ---------------------------------------------------------------- fine-tuning


def test_the_loss_is_cross_entropy_over_the_epochs_items(spec: SentenceEncoderSpec) -> None:
    module = ready(spec)
    module.on_train_epoch_start()
    table = module.items.clone()
    with torch.no_grad():
        for p in module.network.parameters():
            p.add_(0.05 * torch.randn_like(p))  # the items stay those of the epoch's start
    states = torch.stack([by_hand(module, [3, 2, 1]), by_hand(module, [5, 4])])
    logits = (states @ table[1:].T) / 0.05
    expected = F.cross_entropy(logits, torch.tensor([3, 1]), reduction="sum") / 2
    loss = module.training_step(batch(), 0)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(module.item_vectors(), table)


def trained(module: Any, steps: int = 20) -> tuple[list[float], set[str]]:
    """Losses, and which parameters moved."""
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    module.train()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.003)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module.training_step(batch(), 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("kind", [RecformerModule, RecformerPretrainingModule])
def test_every_trained_parameter_moves(spec: SentenceEncoderSpec, kind: Any) -> None:
    module = ready(spec, kind)
    if kind is RecformerModule:
        module.on_train_epoch_start()
    losses, moved = trained(module)
    assert losses[-1] < losses[0]
    assert moved == {n for n, p in module.named_parameters() if p.requires_grad}
    assert not any("pooler" in n for n in moved)


def test_phase_2_keeps_the_items_of_phase_1(spec: SentenceEncoderSpec, tmp_path: Path) -> None:
    first = ready(spec)
    first.on_train_epoch_start()
    trained(first, 3)
    checkpoint = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    assert "items" in checkpoint["state_dict"]
    file = tmp_path / "phase1.ckpt"
    torch.save(checkpoint, file)

    second = ready(spec, phase1=str(file))
    kept = first.items.clone()
    assert torch.equal(second.items, kept)
    with torch.no_grad():
        assert torch.equal(second.user_vectors(batch()), first.user_vectors(batch()))
    second.on_train_epoch_start()
    trained(second, 3)
    assert torch.equal(second.items, kept)
    trained(first, 1)
    first.on_train_epoch_start()  # phase 1 would have moved them
    assert not torch.equal(first.items, kept)
    with torch.no_grad():
        require_same_scores(second, ready(spec), batch(), ITEMS, tmp_path)


def test_it_starts_from_its_pre_training_but_for_the_items(
    spec: SentenceEncoderSpec, tmp_path: Path
) -> None:
    before = ready(spec, RecformerPretrainingModule)
    trained(before, 2)
    file = tmp_path / "pretraining.ckpt"
    torch.save({"state_dict": before.state_dict()}, file)
    module = ready(spec, start=str(file))
    with torch.no_grad():
        torch.testing.assert_close(module.user_vectors(batch()), before.user_vectors(batch()))
        torch.testing.assert_close(module.item_vectors(), before.item_vectors())
    with pytest.raises(ValueError, match="items missing in it"):
        ready(spec, phase1=str(file))
    with pytest.raises(ValueError, match="give one of them"):
        built(spec, start="a", phase1="b")


# ---------------------------------------------------------------- pre-training


def test_the_contrast_by_hand(spec: SentenceEncoderSpec) -> None:
    module = ready(spec, RecformerPretrainingModule, mask_weight=0.0, negatives=6)
    pool = module._negatives(batch(), TARGETS > 0).tolist()
    expected = 0.0
    for history, target in (([3, 2, 1], 4), ([5, 4], 2)):
        user = by_hand(module, history).detach()
        listed = [target, *(j for j in pool if j != target)]
        logits = torch.stack([user @ by_hand(module, [j]).detach() for j in listed]) / 0.05
        expected += -logits.log_softmax(0)[0].item()
    loss = module.training_step(batch(), 0)
    assert loss.item() == pytest.approx(expected / 2, rel=1e-4)


def test_hidden_tokens_by_hand(spec: SentenceEncoderSpec) -> None:
    module = ready(spec, RecformerPretrainingModule, mask_probability=0.3)
    tokens = module.history_tokens(batch())
    chosen, ids = module._hide(tokens, batch().user, 0)
    assert not chosen[tokens.items == 0].any()
    assert chosen[:2].any(1).all()
    assert torch.equal(ids[~chosen], tokens.ids[~chosen])
    table = module.network.encoder.get_input_embeddings().weight
    expected = 0.0
    for row in range(2):
        states = module.network.states(tokens, ids)[row]
        places = chosen[row].nonzero()[:, 0]
        hidden = module.head.dense(states[places])
        logits = module.head.norm(F.gelu(hidden)) @ table.T + module.head.bias
        target = tokens.ids[row][places]
        expected += -logits.log_softmax(1)[torch.arange(len(places)), target].mean().item()
    rows = torch.tensor([True, True, False])
    assert module._masked(tokens, batch().user, rows, 0).item() == pytest.approx(expected, rel=1e-4)


def test_shares_of_hidden_tokens(spec: SentenceEncoderSpec) -> None:
    module = ready(spec, RecformerPretrainingModule)
    tokens = module.tokens(torch.tensor([[1, 2, 3]] * 4000))
    chosen, ids = module._hide(tokens, torch.arange(4000), 0)
    asked = int((tokens.items > 0).sum())
    assert chosen.sum() / asked == pytest.approx(0.15, abs=0.01)  # rows of 25 rarely have none
    hidden = ids[chosen] == module.tokenizer.mask_token_id
    same = ids[chosen] == tokens.ids[chosen]
    assert hidden.float().mean() == pytest.approx(0.8, abs=0.01)
    assert same.float().mean() == pytest.approx(0.1, abs=0.01)


def test_a_step_does_not_depend_on_how_its_batch_is_spread(spec: SentenceEncoderSpec) -> None:
    """Two devices, or two micro batches: sums over the count of the whole batch."""
    module = ready(spec, RecformerPretrainingModule)
    whole = module.training_step(batch(), 0)
    parts = [module.training_step(batch(slice(i, i + 1)), 0) for i in (0, 1)]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    attached(module, step=4)
    assert not torch.equal(module.training_step(batch(), 0), whole)


def test_the_zero_shot_model_can_be_a_backbone(spec: SentenceEncoderSpec, tmp_path: Path) -> None:
    before = ready(spec, RecformerPretrainingModule).eval()
    file = tmp_path / "best.ckpt"
    torch.save({"state_dict": before.state_dict()}, file)
    held = built(spec, RecformerPretrainingModule)
    stage = Stage1Module(CATALOG, held, str(file), spec, latent_size=4, encoder_trained="none")
    attached(stage)
    stage.configure_model()
    names = {n.split(".")[0] for n, p in stage.named_parameters() if p.requires_grad}
    assert names == {"item_coder", "text_coder"}
    with torch.no_grad():
        torch.testing.assert_close(stage.frozen_items(), before.item_vectors())


# ---------------------------------------------------------------- what is learned from


def test_one_training_event_of_each_user_is_asked_for() -> None:
    items = np.array([1, 2, 3, 4, 5, 1, 4, 2, 5, 1], np.int32)
    split = np.array([TRAIN] * 4 + [VALID, TEST] + [TRAIN] * 2 + [VALID, TEST], np.int8)
    held = Histories(np.array([0, 0, 6, 10]), items, split, np.arange(10), ITEMS)

    def rows(epoch: int, filler: Any = None) -> Rows:
        user = np.array([1, 2])
        return Rows(held, user - 1, user, np.array([0, 6]), np.array([4, 8]), epoch, 0, filler, 2.0)

    seen = set()
    for epoch in range(40):
        made = OneTargetCollator(2)(rows(epoch))
        again = OneTargetCollator(2)(rows(epoch))
        assert made.targets is not None
        assert again.targets is not None
        assert torch.equal(made.targets, again.targets)
        (target,) = made.targets[0][made.targets[0] > 0].tolist()
        seen.add(target)
        history = made.history[0][: int(made.length[0])].tolist()
        assert history == {2: [1], 3: [1, 2], 4: [2, 3]}[target]
        assert made.targets[1].max() == 2
    assert seen == {2, 3, 4}
    newest = OneTargetCollator(2, sampled=False)(rows(0, np.array([False, True])))
    assert newest.targets is not None
    assert newest.targets.tolist() == [[0, 4], [0, 0]]
    assert newest.history.tolist() == [[2, 3], [4, 0]]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [({"fields": ()}, "1 to 3"), ({"fields": ("title", "title")}, "1 to 3"),
     ({"attribute_tokens": 1}, "at least 2"),
     ({"temperature": 0.0}, "above 0"), ({"window": 3}, "even"), ({"windows": "all"}, "windows=newest"),
     ({"table_optimizer": "rowwise_adagrad"}, "adamw")],
)  # fmt: skip
def test_settings_that_cannot_be(
    spec: SentenceEncoderSpec, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        built(spec, **options)


def test_what_pre_training_refuses(spec: SentenceEncoderSpec) -> None:
    with pytest.raises(ValueError, match="a loss of its own"):
        built(spec, RecformerPretrainingModule, loss="ce")
    with pytest.raises(ValueError, match="within 0"):
        built(spec, RecformerPretrainingModule, mask_probability=0.0)
    nothing = RecformerModule(ITEMS, CATALOG, spec, fields=("brand",))
    assert nothing.impossible(None) == "no item has a brand"  # type: ignore[arg-type]
