"""Margins from one forward pass: label ids in context, padding that changes nothing, the head."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import attach_adapter
from lightning_modules.llm.label_scoring import (
    NO_LOSS,
    SharedPrefix,
    answer_losses,
    label_tokens,
    last_logits,
    margin,
    only_tokens,
    pad_left,
)
from lightning_modules.llm.masks import layer_windows
from lightning_modules.llm.specs import AdapterSpec
from tests.lightning_modules.tiny_llm import TINY


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    TINY[request.param](folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder), model


def test_labels_are_tokenised_behind_the_prompt(tiny: Any) -> None:
    tokenizer, _ = tiny
    prompt = "Will the user like Alien (1979)?\n"
    found = label_tokens(tokenizer, prompt, ("Yes.", "No."))
    assert found.shared == ()
    for label, ids, first in zip(
        ("Yes.", "No."), found.full, (found.first, found.second), strict=True
    ):
        assert tokenizer.decode(ids) == label
        assert ids[0] == first
    assert tokenizer.decode([found.first]) == "Yes"  # one token of the tiny vocabulary


def test_what_both_labels_begin_with_stands_behind_the_prompt(tiny: Any) -> None:
    tokenizer, _ = tiny
    found = label_tokens(tokenizer, "?\n", ("I say Yes", "I say No"))
    assert tokenizer.decode(found.shared) == "I say "[: len(tokenizer.decode(found.shared))]
    assert len(found.shared) > 0
    whole = tokenizer("?\nI say Yes")["input_ids"]
    before = tokenizer("?\n")["input_ids"]
    assert whole == [*before, *found.shared, found.first, *found.full[0][len(found.shared) + 1 :]]


def test_labels_that_cannot_be_told_apart_are_refused(tiny: Any) -> None:
    tokenizer, _ = tiny
    with pytest.raises(ModelError, match="two labels"):
        label_tokens(tokenizer, "?\n", ("Yes",))
    with pytest.raises(ModelError, match="begins with"):
        label_tokens(tokenizer, "?\n", ("Yes", "Yes it is"))
    with pytest.raises(ModelError, match="share a token"):
        label_tokens(tokenizer, "Answer Ye", ("s", "No"))


def test_rows_of_any_length_have_the_logits_that_they_have_alone(tiny: Any) -> None:
    tokenizer, model = tiny
    texts = ["Heat (1995)", "The user liked Heat (1995) and disliked Jaws (1975).", "No"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    tokens, mask = pad_left(rows, pad=3)
    assert mask.sum(1).tolist() == [len(r) for r in rows]
    with torch.no_grad():
        together = last_logits(model, tokens, mask, keep=2)  # (B, 2, V)
        for row, ids in enumerate(rows):
            alone = model(torch.tensor([ids])).logits[0]  # (L, V)
            kept = min(2, len(ids))
            torch.testing.assert_close(together[row, -kept:], alone[-kept:], atol=1e-4, rtol=1e-4)


def test_a_shared_prefix_changes_nothing_but_the_work(tiny: Any) -> None:
    tokenizer, model = tiny
    start = tokenizer("The user liked Heat (1995) and ")["input_ids"]
    ends = [[40, 41, 42], [50], [60, 61, 62, 63, 64, 65, 66, 67, 68]]
    tokens, mask = pad_left([start + end for end in ends], pad=3)
    with torch.no_grad():
        expected = last_logits(model, tokens, mask)
        shared = SharedPrefix(model, start)
        for _ in range(2):  # the first batch must not grow what the second one reads
            torch.testing.assert_close(
                shared.last_logits(tokens, mask), expected, atol=1e-4, rtol=1e-4
            )
        both = last_logits(model, tokens[::2], mask[::2], keep=3)
        found = shared.last_logits(tokens[::2], mask[::2], keep=3)
        torch.testing.assert_close(found, both, atol=1e-4, rtol=1e-4)
        alone = shared.last_logits(tokens[1:2, -len(start) - 1 :], mask[1:2, -len(start) - 1 :])
        torch.testing.assert_close(alone, expected[1:2], atol=1e-4, rtol=1e-4)


def test_gradients_pass_through_a_shared_prefix(tiny: Any) -> None:
    tokenizer, model = tiny
    start = tokenizer("The user liked Heat (1995) and ")["input_ids"]
    tokens, mask = pad_left([start + end for end in ([40, 41, 42], [50])], pad=3)
    names = dict(model.named_parameters())
    weight = next(p for n, p in names.items() if "k_proj.weight" in n).requires_grad_()
    found = []
    shared = SharedPrefix(model, start)
    for logits in (last_logits(model, tokens, mask), shared.last_logits(tokens, mask)):
        (logits[..., 40] - logits[..., 41]).sum().backward()
        assert weight.grad is not None
        found.append(weight.grad)
        weight.grad = None
    weight.requires_grad_(False)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_the_margin_is_the_log_odds_of_the_two_answers(tiny: Any) -> None:
    tokenizer, model = tiny
    labels = label_tokens(tokenizer, "?\n", ("Yes", "No"))
    tokens, mask = pad_left([tokenizer("Alien (1979)?\n")["input_ids"]], pad=3)
    with torch.no_grad():
        logits = last_logits(model, tokens, mask)[:, 0]
    p = logits.double().softmax(-1)
    odds = (p[:, labels.first] / p[:, labels.second]).log()
    torch.testing.assert_close(margin(logits, labels).double(), odds, atol=1e-5, rtol=1e-5)
    assert margin(logits.bfloat16(), labels).dtype == torch.float32


@torch.no_grad()
def test_few_tokens_logits_are_not_rounded_as_the_heads_are(tiny: Any) -> None:
    tokenizer, model = tiny
    rounded = deepcopy(model).bfloat16()
    head = rounded.get_output_embeddings()
    head.weight.mul_(100)  # logits in the hundreds, which bfloat16 tells apart by whole numbers
    prompts = [tokenizer(f"Alien ({year})?\n")["input_ids"] for year in range(1960, 1990)]
    tokens, mask = pad_left(prompts, pad=3)
    states: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    whole = last_logits(rounded, tokens, mask)
    with only_tokens(rounded, (40, 41)):
        few = last_logits(rounded, tokens, mask)
    hook.remove()
    assert few.shape == (30, 1, 2)
    expected = states[0].double() @ head.weight[[40, 41]].double().T
    torch.testing.assert_close(few.double(), expected, atol=1e-3, rtol=1e-5)
    margins, coarse = few[..., 0] - few[..., 1], whole[..., 40] - whole[..., 41]
    torch.testing.assert_close(margins, coarse, atol=8.0, rtol=0)
    assert len(margins.unique()) > len(coarse.unique())
    assert last_logits(rounded, tokens, mask).equal(whole)  # the head is its own again


@torch.no_grad()
def test_a_row_is_answered_where_greedy_writing_begins_with_a_label(tiny: Any) -> None:
    _, model = tiny
    prompts = torch.randint(4, 300, (30, 9), generator=torch.manual_seed(0)).tolist()
    tokens, mask = pad_left([row[: 3 + i % 7] for i, row in enumerate(prompts)], pad=3)
    said = model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=3
    )[:, -1]
    kinds, counts = said.unique(return_counts=True)
    first = int(kinds[counts.argmax()])
    second = next(i for i in range(4, 300) if i not in kinds)  # which no row would say
    answered: list[torch.Tensor] = []
    with only_tokens(model, (second, first), answered):
        few = last_logits(model, tokens, mask, keep=2)
    assert few.shape == (30, 2, 2)
    assert [a.shape for a in answered] == [(30, 2)]
    assert answered[0][:, -1].equal(said == first)
    assert answered[0][:, -1].any()
    assert not answered[0][:, -1].all()
    likeliest = few[said == first, -1].argmax(-1)
    assert (likeliest == 1).all()


def test_padding_on_the_left() -> None:
    tokens, mask = pad_left([[5, 6, 7], [], [8]], pad=3)
    assert tokens.tolist() == [[5, 6, 7], [3, 3, 3], [3, 3, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert pad_left([], pad=3)[0].shape == (0, 0)


def test_losses_of_answers_are_exact_over_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    logits, answers = 3 * torch.randn(2, 5, 49_152), torch.randint(0, 49_152, (2, 5))
    answers[1, :3] = NO_LOSS
    said = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    each = -said.gather(-1, answers.clamp(min=0)[..., None])[..., 0]
    wanted = torch.stack([each[0].mean(), each[1, 3:].mean()])
    # In float32 a sum in the vocabulary's order alone is off by 5e-5.
    torch.testing.assert_close(answer_losses(logits, answers).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
@torch.no_grad()
def test_padding_changes_no_adapters_scores(tiny: Any, method: Any) -> None:
    _, model = tiny
    spec = AdapterSpec(method, num_virtual_tokens=3) if method != "lora" else AdapterSpec(method)
    if method == "prefix" and any(layer_windows(model).values()):  # type: ignore[union-attr]
        assert model.config.model_type in ("gemma3_text", "mistral")
        with pytest.raises(ModelError, match=r"layers see a window.*method=prompt or lora"):
            attach_adapter(deepcopy(model), spec, seed=0)
        return
    adapted = attach_adapter(deepcopy(model), spec, seed=0).eval()
    for weight in (p for p in adapted.parameters() if p.requires_grad):
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.manual_seed(1)))
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]
    together = last_logits(adapted, *pad_left(rows, 3), keep=2)
    for row, ids in enumerate(rows):
        tokens = torch.tensor([ids])
        plain = adapted(input_ids=tokens).logits[
            :, -2:
        ]  # as PEFT itself reads a row without padding
        torch.testing.assert_close(together[row : row + 1], plain, atol=1e-4, rtol=0)
        alone = last_logits(adapted, tokens, torch.ones_like(tokens), keep=2)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)
