"""Attention for training in bfloat16 on a CPU, where torch's kernel loses what bfloat16 gains.

The backward pass of ``scaled_dot_product_attention`` is no faster in bfloat16 than in float32 there (torch
2.13); as matrix products the two passes take a quarter to a half of its time. Everything else stays with
torch's kernel.

Legend: B rows, H heads, G heads of keys and values, Q tokens that read, K tokens that are read, d width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lightning_modules.errors import ModelError
from lightning_modules.llm.model_files import first_line
from lightning_modules.llm.specs import Attention

IN_PRODUCTS = "sdpa_trained_in_products"  # its name in transformers
TAKE_MASKS = ("sdpa", "eager", IN_PRODUCTS)  # implementations that take any mask
MOST_SCORES = (
    2**26
)  # B x H x Q x K: beyond it the scores, which torch's kernel never holds, take too much


def implementation(asked: Attention, device: torch.device, dtype: torch.dtype) -> str:
    """What transformers is to use where ``asked`` was asked for; registered with it when it is ours."""
    if asked != "sdpa" or device.type != "cpu" or dtype != torch.bfloat16:
        return asked
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IN_PRODUCTS, trained_in_products)
    AttentionMaskInterface.register(IN_PRODUCTS, sdpa_mask)
    return IN_PRODUCTS


def unusable(error: Exception) -> ModelError | None:
    """What to tell of an error that is no fault of a model's files: a package that is missing; or None."""
    said = first_line(error).rstrip(".")
    if re.search("flash.?att", said, re.IGNORECASE):
        return ModelError(
            f"llm.attention=flash_attention_2 cannot be had here ({said}): install the package flash-attn on "
            "a machine with a GPU, or take llm.attention=sdpa"
        )
    missing = isinstance(error, ImportError)
    return ModelError(f"a package is missing ({said}): install it") if missing else None


def trained_in_products(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(B, Q, H, d) what each token reads, as transformers' attention functions return it.

    Args:
        module: the layer's attention.
        query: (B, H, Q, d).
        key, value: (B, G, K, d).
        attention_mask: (B or 1, 1, Q, K) bool, whom a token sees.
        scaling: of the scores; None is 1 / sqrt(d).
        options: of transformers' own function.
    """
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    known = attention_mask is not None and attention_mask.dtype == torch.bool
    plain = not any(options.get(n) is not None for n in ("position_bias", "softcap"))
    plain = plain and not options.get("dropout")
    if learns and known and plain and scores <= MOST_SCORES:
        assert attention_mask is not None
        return in_products(query, key, value, attention_mask, scaling), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    read: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )[0]
    return read, None


def in_products(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V as (B, Q, H, d), contiguous; heads that share keys are one product."""
    rows, heads, length, width = query.shape
    groups, read = key.shape[1], key.shape[2]
    query = query * (width**-0.5 if scaling is None else scaling)
    grouped = query.reshape(rows, groups, -1, width)  # (B, G, H / G * Q, d)
    scores = (grouped @ key.transpose(2, 3)).view(rows, heads, length, read)
    hidden = torch.zeros((), dtype=scores.dtype).masked_fill(~seen, torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores + hidden, dim=-1)  # (B, H, Q, K), summed in float32 by the kernel
    found = (shares.view(rows, groups, -1, read) @ value).view(rows, heads, length, width)
    return found.transpose(1, 2).contiguous()
