"""What flash attention is given, on a CPU: its kernels are replaced by their definition.

The kernels themselves need a GPU (``test_gpu.py``). Which tokens they are handed is decided before: rows are
laid one after the other without their padding, and a shared beginning is read from the cache.

Legend: Q tokens that read, K tokens that are read, H heads, G heads of keys and values, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor

from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer
from lightning_modules.llm.generation import generate
from lightning_modules.llm.label_scoring import SharedPrefix, last_logits, pad_left
from lightning_modules.llm.packing import pack, packed_logits, require_rows_apart
from lightning_modules.llm.specs import BackboneSpec
from tests.lightning_modules.tiny_llm import LONGEST, TINY

OPENING = list(range(20, 56))  # long enough to be worth reading once, and longer than any window
ROWS = [[*OPENING, 33, 34, 35, 36, 37, 38], [*OPENING, 40], [*OPENING, 50, 51, 52]]
FLASH: Any = "flash_attention_2"


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
    """(Q, H, d) of one sequence, q (Q, H, d), k and v (K, G, d); the last token reads all of them."""
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    back = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))  # (Q, K)
    seen = (back >= 0) & ((back <= window[0]) | (window[0] < 0))
    shares = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, v)


def whole(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None, causal: bool = False,
    window_size: Any = (-1, -1), dropout_p: float = 0.0, softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """``flash_attn_func``: (B, Q, H, d)."""
    assert causal or q.shape[1] == 1
    rows = zip(q, k, v, strict=True)
    return torch.stack([attend(*row, softmax_scale, window_size) for row in rows])


def in_pieces(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: Any = None, causal: bool = False,
    window_size: Any = (-1, -1), dropout_p: float = 0.0, softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """``flash_attn_varlen_func``: sequences one after the other, (Q, H, d) of all."""
    assert causal or max_seqlen_q == 1
    read = [c.tolist() for c in (cu_seqlens_q, cu_seqlens_k)]
    places = zip(read[0][:-1], read[0][1:], read[1][:-1], read[1][1:], strict=True)
    return torch.cat(
        [attend(q[a:b], k[c:d], v[c:d], softmax_scale, window_size) for a, b, c, d in places]
    )


@pytest.fixture(params=sorted(TINY))
def models(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any, Any]:
    """By torch's kernel, by flash attention's definition, and the tokenizer."""
    kernels = (whole, in_pieces, None, flash._pad_input, flash._unpad_input)
    settle: Any = flash._lazy_define_process_function(in_pieces)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_: (kernels, (settle, None)))
    TINY[request.param](tmp_path)
    spec = BackboneSpec(str(tmp_path), dtype="float32", chat_template=False, max_length=LONGEST)
    plain, stood_in = (load_causal_lm(spec, "cpu") for _ in range(2))
    stood_in.config._attn_implementation_internal = FLASH  # the setter asks for the package
    assert stood_in.config._attn_implementation == FLASH
    return plain, stood_in, load_tokenizer(spec)


def packed(model: Any, attention: Any) -> Tensor:
    batch = pack([row[:-1] for row in ROWS], [row[1:] for row in ROWS], math.inf, 3, 1.0)
    assert batch.positions is not None
    assert batch.columns is not None
    return packed_logits(model, batch.tokens, batch.positions, batch.columns, attention)


@torch.no_grad()
def test_every_way_to_read_prompts_is_the_same(models: tuple[Any, Any, Any]) -> None:
    plain, stood_in, tokenizer = models
    some, alike = pad_left(ROWS, 3), pad_left([row[: len(OPENING) + 1] for row in ROWS], 3)
    ways: dict[str, Callable[[Any], Tensor]] = {
        "padded": lambda m: last_logits(m, *some, keep=2),
        "one row": lambda m: last_logits(m, some[0][:1], some[1][:1]),
        "behind a shared beginning": lambda m: SharedPrefix(m, OPENING).last_logits(*some),
        "behind it, of like lengths": lambda m: SharedPrefix(m, OPENING).last_logits(*alike),
    }
    for name, read in ways.items():
        found, expected = read(stood_in), read(plain)
        torch.testing.assert_close(
            found, expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(packed(stood_in, FLASH), packed(plain, "sdpa"), atol=1e-4, rtol=1e-4)
    require_rows_apart(stood_in, FLASH)
    for share in (True, False):
        texts = [generate(m, tokenizer, ROWS, 6, share=share) for m in (stood_in, plain)]
        assert texts[0] == texts[1]
