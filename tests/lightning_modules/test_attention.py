"""Attention in products: what torch's kernel computes, where it learns in bfloat16 on a CPU alone."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.errors import ModelError
from lightning_modules.llm import attention
from lightning_modules.llm.attention import IN_PRODUCTS, implementation, trained_in_products
from lightning_modules.llm.backbones import load_causal_lm
from lightning_modules.llm.candidate_scoring import candidate_log_likelihoods
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.specs import BackboneSpec

CPU = torch.device("cpu")


def _drawn(heads: int, groups: int, reads: int, width: int = 16) -> tuple[list[Tensor], Tensor]:
    """Query, keys and values of two rows in float64, and a mask: causal, the second row with padding."""
    draw = torch.Generator().manual_seed(heads * reads)
    shapes = ((2, heads, reads, width), (2, groups, 9, width), (2, groups, 9, width))
    tensors = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    seen = torch.ones(reads, 9, dtype=torch.bool).tril(9 - reads).repeat(2, 1, 1, 1)
    seen[1, :, :, 0] = reads == 9  # padding, which reads itself
    return tensors, seen


def _reference(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """The equation, a head at a time."""
    shared = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // shared].transpose(1, 2) / query.shape[-1] ** 0.5
        shares = F.softmax(scores.masked_fill(~seen[:, 0], -torch.inf), dim=-1)
        heads.append(shares @ value[:, head // shared])
    return torch.stack(heads, dim=2)  # (B, Q, H, d)


@pytest.mark.parametrize(("heads", "groups", "reads"), [(4, 4, 9), (6, 2, 9), (6, 2, 3), (4, 1, 1)])
def test_products_are_attention(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, reads: int
) -> None:
    tensors, seen = _drawn(heads, groups, reads)
    kernel: list[str] = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: kernel.append("used"))
    exact = [t.clone().requires_grad_() for t in tensors]
    found, _ = trained_in_products(SimpleNamespace(), *exact, seen)
    wanted = _reference(*tensors, seen)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert found.is_contiguous()
    assert not kernel
    again = [t.clone().requires_grad_() for t in tensors]
    towards = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    mine = torch.autograd.grad(found, exact, towards)
    theirs = torch.autograd.grad(_reference(*again, seen), again, towards)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    # In bfloat16: its rounding (2^-8) of values of a few units.
    rounded = [t.bfloat16().requires_grad_() for t in tensors]
    half, _ = trained_in_products(SimpleNamespace(), *rounded, seen)
    torch.testing.assert_close(half.double(), wanted, rtol=0.05, atol=0.05)


def test_what_does_not_learn_or_is_too_large_stays_with_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tensors, seen = _drawn(4, 4, 9)
    layer: Any = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    products: list[int] = []
    real = attention.in_products
    monkeypatch.setattr(
        attention,
        "in_products",
        lambda *a: products.append(1) or real(*a),  # type: ignore[func-returns-value]
    )
    kernel = sdpa_attention_forward(layer, *tensors, seen)[0]

    def asked(mask: Tensor | None = seen, **options: Any) -> Tensor:
        learning = [t.clone().requires_grad_() for t in tensors]
        return trained_in_products(layer, *learning, mask, **options)[0]

    with torch.no_grad():
        assert torch.equal(asked(), kernel)
    assert torch.equal(trained_in_products(layer, *tensors, seen)[0], kernel)  # nothing learns
    asked(None)
    asked(dropout=0.1)
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * 4 * 9 * 9 - 1)
    asked()
    assert not products
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * 4 * 9 * 9)
    asked()
    assert products


def test_it_is_for_bfloat16_on_a_cpu() -> None:
    assert implementation("sdpa", CPU, torch.bfloat16) == IN_PRODUCTS
    assert implementation("sdpa", CPU, torch.float32) == "sdpa"
    assert implementation("sdpa", torch.device("cuda"), torch.bfloat16) == "sdpa"
    assert implementation("eager", CPU, torch.bfloat16) == "eager"


def test_a_language_model_learns_what_it_would_learn_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = torch.arange(4, 44).view(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0

    def gradient(most: int) -> Tensor:
        monkeypatch.setattr(attention, "MOST_SCORES", most)
        model = load_causal_lm(BackboneSpec(RandomModel(), dtype="bfloat16"), CPU)
        weight = model.model.layers[0].self_attn.v_proj.weight.requires_grad_()
        out = model(input_ids=tokens, attention_mask=mask).logits[:, -1].float()
        (found,) = torch.autograd.grad(out.log_softmax(-1)[:, 7].sum(), weight)
        return found.float()

    products, kernel = gradient(attention.MOST_SCORES), gradient(0)
    assert not torch.equal(products, kernel)  # else one of them was not used
    assert F.cosine_similarity(products.flatten(), kernel.flatten(), dim=0) > 0.99


def test_candidates_are_scored_and_learned_from() -> None:
    model = load_causal_lm(BackboneSpec(RandomModel(), dtype="bfloat16"), CPU)
    asked: Any = ([[4, 5, 6], [7]], [[[8], [9, 10]], [[11, 12]]], 3)
    with torch.no_grad():
        kernel = candidate_log_likelihoods(model, *asked).total
    model.requires_grad_()
    products = candidate_log_likelihoods(model, *asked).total
    torch.testing.assert_close(products, kernel, rtol=0.02, atol=0.02)
    assert products.requires_grad


@pytest.mark.skipif(
    any(map(importlib.util.find_spec, ("flash_attn", "kernels"))), reason="flash-attn is there"
)
def test_attention_that_is_not_installed_is_told_with_another() -> None:
    spec = BackboneSpec(RandomModel(), attention="flash_attention_2", dtype="bfloat16")
    with pytest.raises(ModelError, match=r"FlashAttention2 .*flash-attn.*llm\.attention=sdpa"):
        load_causal_lm(spec, CPU)
    lacking = attention.unusable(ImportError("gguf is not installed.\nSee there."))
    assert str(lacking) == "a package is missing (gguf is not installed): install it"
    assert attention.unusable(ValueError("some weights are odd")) is None
