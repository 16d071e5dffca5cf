"""Who sees whom: attention masks of our own, also for layers that see a window of the newest tokens only.

Legend: B rows, Q tokens that read, K tokens that are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.errors import ModelError


def layer_windows(model: Any) -> dict[str, int | None] | None:
    """How many tokens a layer of each kind sees, itself among them (None: all); None of unknown kinds.

    All layers of LLaMA see everything, all of Mistral a window; those of Gemma take turns.
    """
    config = model.config.get_text_config()
    # Of the class, too: files may name a window that their model does not know.
    window = config.sliding_window if hasattr(type(config), "sliding_window") else None
    usual = "full_attention" if window is None else "sliding_attention"
    kinds = set(getattr(config, "layer_types", None) or [usual])
    sees = {"full_attention": None, "sliding_attention": window}
    return {kind: sees[kind] for kind in sorted(kinds)} if kinds <= set(sees) else None


def refuse_prefix(model: Any) -> None:
    """Refuse prefix tuning of a model whose layers see a part of the text only.

    PEFT leaves masks to transformers there, which count a window in columns, padding included.

    Raises:
        ModelError: a layer of the model has a window.
    """
    windows = layer_windows(model)
    if windows is None or any(windows.values()):
        raise ModelError(
            "adapter prefix does not fit a language model whose layers see a window of the newest tokens: "
            "a row's scores would depend on the rows beside it; take module.adapter.method=prompt or lora"
        )


def attention_mask(
    model: Any, seen: Tensor, reader: Tensor, read: Tensor
) -> Tensor | dict[str, Tensor]:
    """What a model of transformers takes as ``attention_mask``: one for all layers, or one for each kind.

    Left to itself transformers counts a window in columns, padding and foreign tokens included.

    Args:
        model: its attention is sdpa or eager.
        seen: (B, 1, Q, K) whether a layer without a window lets a token see another.
        reader: (B, Q) places of the tokens that read, each in its own text.
        read: (B, K) places of those that are read.

    Raises:
        ModelError: it has layers of another kind.
    """
    windows = layer_windows(model)
    if windows is None:
        raise ModelError(
            "this language model has layers that take no mask of our own: choose another, or set "
            "packing=false where rows are packed"
        )
    masks = {}
    for kind, window in windows.items():
        near = seen
        if window is not None:
            near = seen & (reader[:, None, :, None] - read[:, None, None, :] < window)
        masks[kind] = _added(model, near)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def padding_mask(model: Any, real: Tensor, positions: Tensor, first: int = 0) -> Any:
    """``attention_mask`` of rows with padding anywhere, of which the tokens from ``first`` on read.

    Flash attention leaves padding out by itself, and is given ``real``.

    Args:
        model: of transformers.
        real: (B, K) 1 at tokens, 0 at padding.
        positions: (B, K) places of the tokens, each in its own text.
        first: where the reading tokens begin; what stands before is read only.
    """
    if model.config._attn_implementation == "flash_attention_2":
        return real
    length = real.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    own = torch.eye(length, dtype=torch.bool, device=real.device)
    # A row of a softmax must not be empty: padding reads itself, and nobody reads padding.
    seen = (earlier[first:] & real[:, None, None].bool()) | own[first:]  # (B, 1, Q, K)
    return attention_mask(model, seen, positions[:, first:], positions)


def _added(model: Any, seen: Tensor) -> Tensor:
    """As sdpa takes it, or as eager attention adds it."""
    if model.config._attn_implementation != "eager":
        return seen
    least = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, least)
