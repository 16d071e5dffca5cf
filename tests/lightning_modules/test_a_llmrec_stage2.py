"""A-LLMRec's second stage: its vectors in the prompt, loss and scores by definition, and who learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_modules.a_llmrec import Stage2Module
from lightning_modules.a_llmrec.prompts import USER, before_target
from lightning_modules.errors import ModelError
from lightning_modules.llm import AdapterSpec, BackboneSpec
from lightning_modules.llm.label_scoring import last_logits
from lightning_modules.llm.prompt_tokens import some_rows
from tests.lightning_modules.a_llmrec_data import CATALOG, ITEMS, WIDTH, Parts, histories


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


def vector_at(module: Any, slot: int, row: int, split: str) -> torch.Tensor:
    """(H,) by definition."""
    if slot == USER:
        found: torch.Tensor = module.user_projector(module.user_states(split)[row])
    else:
        found = module.item_projector(module.item_states()[slot])
    return found


def embeddings_of(module: Any, batch: Any, row: int, split: str) -> torch.Tensor:
    """(L, H) of one row without its padding, put together one token after the other."""
    real = batch.token_mask[row].bool()
    tokens, slots = batch.tokens[row][real].tolist(), batch.slots[row][real].tolist()
    table = module.model.get_input_embeddings().weight
    number = int(batch.row[row])
    return torch.stack([
        vector_at(module, slot, number, split) if slot else table[token]
        for token, slot in zip(tokens, slots, strict=True)
    ])  # fmt: skip


def log_p(module: Any, embeddings: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """(A,) of an answer's tokens behind (L, H), from all logits of the whole text."""
    table = module.model.get_input_embeddings().weight
    whole = torch.cat([embeddings, table[answer]])[None]
    logits = module.model(inputs_embeds=whole).logits[0].log_softmax(-1)
    start = len(embeddings) - 1
    return torch.stack([logits[start + i, token] for i, token in enumerate(answer)])


def assert_same_loss(module: Any, found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    """Its value, and the gradients of all that is trained."""
    assert found.item() == pytest.approx(expected.item(), abs=atol)
    trained = [p for p in module.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, trained) for loss in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


def first_layer_reads(module: Any, batch: Any, split: str) -> torch.Tensor:
    """(B, L, H)."""
    seen: list[torch.Tensor] = []
    first = module.model.model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with module.soft(batch, split):
        last_logits(module.model, batch.tokens, batch.token_mask)
    hook.remove()
    return seen[0]


def test_slots_hold_exactly_the_projected_vectors(parts: Parts) -> None:
    module, world = parts.stage2()
    for split in ("train", "val", "test"):
        batch = world.batch(split)
        seen = first_layer_reads(module, batch, split)
        for row in range(len(batch)):
            real = batch.token_mask[row].bool()
            expected = embeddings_of(module, batch, row, split)
            torch.testing.assert_close(seen[row][real], expected, atol=1e-6, rtol=0)
            assert (batch.slots[row][real] == USER).sum() == 1
        shown = set(batch.slots[batch.slots > 0].tolist())
        assert shown >= set(batch.candidates.flatten().tolist())


def test_every_request_is_read_and_none_stays(parts: Parts) -> None:
    module, world = parts.stage2()
    for request in (None, "a funny one", "a sad one", None):
        module.request = request
        text = module.tokenizer.decode(world.batch("test").tokens[0])
        said = [
            words for words in ("a funny one", "a sad one") if f'looking for: "{words}"' in text
        ]
        assert said == ([request] if request else [])


@pytest.mark.parametrize("options", [{}, {"chat_template": False}, {"user_token": False}])
def test_the_loss_is_that_of_all_logits_of_each_row_alone(
    parts: Parts, options: dict[str, Any]
) -> None:
    module, world = parts.stage2(**options)
    normaliser, total = 1.5, torch.zeros(())
    batch = world.batch("train", normaliser)
    assert len(batch) == 2  # the third user has no training event with a history
    for row in range(2):
        answer = [*module.table.title(int(batch.target[row])), module.tokenizer.eos_token_id]
        whole = embeddings_of(module, batch, row, "train")
        prompt = whole[: len(whole) - len(answer) + 1]  # the answer's last token is not read
        total = total - log_p(module, prompt, answer).mean()
    expected = total / normaliser
    found = module.training_step(batch, 0)
    assert_same_loss(module, found, expected, atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_choice_is_a_softmax_over_the_candidates_scores(parts: Parts, normalise: bool) -> None:
    module, world = parts.stage2(loss="candidates", normalise=normalise)
    batch = world.batch("train", normaliser=2.0)
    assert batch.answers is None  # no prompt gives its answer away
    total = torch.zeros(())
    for row in range(2):
        prompt = embeddings_of(module, batch, row, "train")
        items = batch.candidates[row].tolist()
        each = [log_p(module, prompt, module.table.title(item)) for item in items]
        scores = torch.stack([e.mean() if normalise else e.sum() for e in each])
        total = total - scores.log_softmax(0)[items.index(int(batch.target[row]))]
    expected = total / 2
    found = module.training_step(batch, 0)
    assert_same_loss(module, found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["answer", "candidates"])
def test_rows_that_keep_ranks_in_step_carry_no_loss(parts: Parts, kind: str) -> None:
    module, world = parts.stage2(loss=kind)
    both = module.training_step(world.batch("train"), 0)
    one = module.training_step(world.batch("train", filler=(0,)), 0)
    other = module.training_step(world.batch("train", filler=(1,)), 0)
    assert both.item() == pytest.approx(one.item() + other.item(), abs=1e-5)
    assert module.training_step(world.batch("train", filler=(0, 1)), 0).item() == 0


@pytest.mark.parametrize("normalise", [True, False])
@torch.no_grad()
def test_scores_are_likelihoods_of_one_candidate_at_a_time(parts: Parts, normalise: bool) -> None:
    module, world = parts.stage2(normalise=normalise)
    batch = world.batch("test")
    batch.candidates[1, 2] = 0  # padding in the midst; the prompt is as it was
    module._split = "test"
    scores = module.score(module.encode(batch), batch.candidates)
    for row in range(len(batch)):
        prompt = embeddings_of(module, batch, row, "test")
        for place, item in enumerate(batch.candidates[row].tolist()):
            if not item:
                assert scores[row, place] == -torch.inf
                continue
            each = log_p(module, prompt, module.table.title(item))
            expected = each.mean() if normalise else each.sum()
            assert scores[row, place].item() == pytest.approx(expected.item(), abs=1e-4)
    turned = module.score(module.encode(batch), batch.candidates.flip(1))
    assert torch.equal(turned, scores.flip(1))
    with pytest.raises(ValueError, match=r"give data\.candidates a set"):
        module.score(module.encode(batch), torch.tensor([1]))


@torch.no_grad()
def test_rows_do_not_know_each_other(parts: Parts) -> None:
    module, world = parts.stage2()
    module._split = "test"
    batch = world.batch("test")
    together = module.encode(batch).scores
    for row in range(len(batch)):
        rows = some_rows(world.every_row("test"), np.array([row]))
        alone = module.encode(module.collator(training=False)(rows)).scores
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("adapter", [None, AdapterSpec(dropout=0.0)])
def test_projectors_learn_and_all_else_stays_bit_identical(
    parts: Parts, adapter: AdapterSpec | None
) -> None:
    module, world = parts.stage2(adapter=adapter, learning_rate=0.01, warmup_steps=0)
    module.train()
    assert module.alignment is not None
    assert not any(m.training for m in module.alignment.modules())
    before = {n: p.detach().clone() for n, p in module.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
    batch = world.batch("train", normaliser=2.0)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    owners = {"lora" if "lora_" in n else n.split(".")[0] for n in trained}
    assert owners == {"user_projector", "item_projector", *(["lora"] if adapter else [])}
    module.on_train_end()


def test_a_fit_that_trains_nothing_is_told(parts: Parts) -> None:
    module, _ = parts.stage2()
    with pytest.raises(ModelError, match="a projector has not moved in 1 steps"):
        module.on_train_end()


def test_a_checkpoint_brings_the_projectors_back(parts: Parts, tmp_path: Any) -> None:
    module, _ = parts.stage2()
    for p in (p for p in module.parameters() if p.requires_grad):
        p.data.normal_()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    kept = {n.split(".")[0] for n in checkpoint["state_dict"]}
    assert kept == {"user_projector", "item_projector"}
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "best.ckpt")
    other, _ = parts.stage2()
    other.load_weights(tmp_path / "best.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_users_state_has_not_met_the_target(parts: Parts) -> None:
    """Another target, and all that comes after it, changes nothing; what comes before does."""
    usual, _ = parts.stage2()
    for split, change in (("train", {"newest": 9, "valid": 8, "test": 7}),
                          ("val", {"valid": 8, "test": 7}), ("test", {"test": 7})):  # fmt: skip
        other, _ = parts.stage2(histories(**change))
        assert torch.equal(usual.user_states(split), other.user_states(split)), split
    other, _ = parts.stage2(histories(newest=9))
    assert torch.equal(usual.user_states("train"), other.user_states("train"))
    assert not torch.equal(usual.user_states("val")[0], other.user_states("val")[0])
    # Each split's rows have vectors of their own.
    assert not torch.equal(usual.user_states("train")[0], usual.user_states("val")[0])
    assert not torch.equal(usual.user_states("val")[0], usual.user_states("test")[0])


def test_an_item_that_nobody_met_is_read_as_its_text_rebuilds_it(parts: Parts) -> None:
    """Items 5, 7 and 10 are in what stands before the test, and in no training event."""
    (own, world), (text, _) = parts.stage2(), parts.stage2(unseen_items="text")
    unseen = torch.tensor([5, 7, 10])
    assert not text.histories.train_counts()[unseen].any()
    backbone, align = text.collaborative, text.alignment
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    found = text.user_states("test")
    assert torch.equal(text.user_states("train"), own.user_states("train"))
    assert (found != own.user_states("test")).any(1).all()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name

    table = backbone.item_vectors()
    with torch.no_grad():
        table[unseen] = align.item_coder.decode(align.text_coder.encode(align.encoder(unseen)))
        rows = before_target(world.every_row("test"))
        expected = backbone.user_vectors(backbone.collator(training=False)(rows))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_backbone_without_one_table_cannot_read_texts(parts: Parts) -> None:
    module, _ = parts.stage2(unseen_items="text")
    module.collaborative.item_vectors = lambda: torch.zeros(ITEMS + 1, WIDTH)
    with pytest.raises(ValueError, match="needs a backbone with one item table"):
        module.user_states("test")


def test_soft_tokens_begin_as_large_as_the_models_own(parts: Parts) -> None:
    """Xavier's weights with a gain: what comes out of the last layer grows with it and in nothing else."""
    module, _ = parts.stage2()
    plain, _ = parts.stage2(projector_gain=1.0)
    size = module.model.get_input_embeddings().weight.square().mean().sqrt()
    for name in ("user_projector", "item_projector"):
        ours, paper = getattr(module, name).layers, getattr(plain, name).layers
        torch.testing.assert_close(ours[3].weight, paper[3].weight * size)
        assert torch.equal(ours[0].weight, paper[0].weight)


def test_what_stands_for_an_item(parts: Parts) -> None:
    alignment = parts.alignment()
    found = {
        kind: parts.stage2(alignment=alignment, item_tokens=kind, cold_share=0.7)[0].item_states()
        for kind in ("item", "text", "by_coldness", "random", "collaborative")
    }
    for kind in ("item", "text"):
        assert torch.equal(found[kind], alignment.joint_vectors(kind)), kind  # type: ignore[arg-type]
    assert found["text"][3].abs().sum() == 0  # it has no text
    assert torch.equal(found["collaborative"], alignment.frozen_items())
    assert found["random"].shape == found["item"].shape
    counts = histories().train_counts()[1:]
    coldest = set((np.argsort(counts, kind="stable")[:8] + 1).tolist())
    assert 12 in coldest
    for item in range(1, 13):
        which = "text" if item in coldest - {3} else "item"
        assert torch.equal(found["by_coldness"][item], found[which][item]), item
    again = parts.stage2(item_tokens="random")[0].item_states()
    assert torch.equal(again, found["random"])  # as in the fit, whoever tests it
    assert all(table[0].abs().sum() == 0 for table in found.values())


@pytest.mark.parametrize(
    ("options", "slots"),
    [({"user_token": False}, "items"), ({"item_tokens": "none"}, "user"),
     ({"item_tokens": "none", "user_token": False, "alignment": None}, "none"),
     ({"item_tokens": "text"}, "both"), ({"item_tokens": "random"}, "both")],
)  # fmt: skip
@torch.no_grad()
def test_without_a_kind_of_token(parts: Parts, options: dict[str, Any], slots: str) -> None:
    module, world = parts.stage2(**options)
    batch = world.batch("test")
    assert bool((batch.slots == USER).any()) == (slots in ("user", "both"))
    assert bool((batch.slots > 0).any()) == (slots in ("items", "both"))
    module._split = "test"
    scores = module.encode(batch).scores
    assert torch.isfinite(scores).all()
    if slots == "none":
        trainer: Any = None
        assert "nothing to train" in str(module.untrainable(trainer))


@torch.no_grad()
def test_a_backbone_without_alignment_and_users_and_items_of_every_kind(parts: Parts) -> None:
    """No text (3), no event (12), and a user without a history: finite scores."""
    module, world = parts.stage2(
        backbone=parts.sasrec(), backbone_weights=str(parts.weights), item_tokens="collaborative"
    )
    aligned, other = parts.stage2(item_tokens="by_coldness")
    for made, data in ((module, world), (aligned, other)):
        rows = data.rows["test"]
        rows.position[2] = data.histories.offsets[
            3
        ]  # nothing stands before the third user's target
        rows.candidates[:, :2] = [[3, 12]] * 3
        rows.target[:] = rows.candidates[:, 3]
        made._split = "test"
        batch = data.batch("test")
        assert batch.length[2] == 0
        assert torch.isfinite(made.encode(batch).scores).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"item_tokens": "joint"}, "item, text, by_coldness"), ({"num_candidates": 1}, "num_candidates"),
     ({"title_tokens": 2}, "title_tokens"), ({"max_users": 0}, "max_users"),
     ({"cold_share": 1.0}, "cold_share"), ({"loss": "title"}, "answer or candidates"),
     ({"adapter": AdapterSpec("prompt")}, "adds tokens"), ({"alignment": None}, "give one"),
     ({"alignment": None, "user_token": False}, "give one")],
)  # fmt: skip
def test_settings_that_cannot_be(parts: Parts, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parts.stage2(**options)


def test_parts_that_were_not_trained_are_refused(parts: Parts) -> None:
    with pytest.raises(ValueError, match=r"inputs: \{alignment.weights"):
        parts.stage2(alignment=parts.alignment(weights=False))
    with pytest.raises(ValueError, match="backbone needs its checkpoint"):
        parts.stage2(backbone=parts.sasrec(), item_tokens="collaborative")
    with pytest.raises(ValueError, match="not both"):
        parts.stage2(alignment=parts.alignment(), backbone=parts.sasrec())
    with pytest.raises(ValueError, match=r"give the data config words"):
        Stage2Module(CATALOG, None, BackboneSpec(parts.llm), alignment=parts.alignment())


def test_projectors_cannot_be_spread(parts: Parts) -> None:
    module, _ = parts.stage2()
    with pytest.raises(ValueError, match=r"launch\.strategy=ddp"):
        module.sharded_strategy(2)


def test_projectors_without_weights_are_not_tested(parts: Parts) -> None:
    module, _ = parts.stage2()
    module.model = None
    for stage in ("test", "predict"):
        with pytest.raises(ModelError, match="random vectors"):
            module.setup(stage)
    module.setup("fit")
    bare, _ = parts.stage2(user_token=False, item_tokens="none")
    bare.model = None
    bare.setup("test")
