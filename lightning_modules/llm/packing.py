"""Several rows one after the other in one sequence, none of which sees another: next to no padding.

Positions restart at each row, and a mask keeps rows apart, so that a packed row's logits are those of the row
alone (Krell et al., "Efficient Sequence Packing without Cross-contamination", arXiv 2107.02027).

Legend: B rows, S sequences, L tokens, A columns that are read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.types import TokenBatch
from lightning_modules.errors import ModelError
from lightning_modules.llm.label_scoring import NO_LOSS
from lightning_modules.llm.masks import attention_mask
from lightning_modules.llm.specs import Attention

_FOREIGN = (
    0.05  # standard deviations that logits may move by when another row changes: rounding in 8 bits
)


def bins(lengths: Sequence[int], room: float) -> list[list[int]]:
    """Rows of each sequence, first-fit decreasing: the longest first, each into the first that has room.

    Takes at most 11/9 of the fewest sequences, and one more (Johnson, 1973).

    Args:
        lengths: (B,) tokens of each row.
        room: tokens of a sequence.

    Raises:
        ValueError: a row is longer than that.
    """
    found: list[list[int]] = []
    left: list[float] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[row] > room:
            raise ValueError(f"a row has {lengths[row]} tokens, more than the {room} of a sequence")
        place = next((i for i, free in enumerate(left) if lengths[row] <= free), len(found))
        if place == len(found):
            found.append([])
            left.append(room)
        found[place].append(row)
        left[place] -= lengths[row]
    return found


def pack(
    read: Sequence[Sequence[int]],
    said: Sequence[Sequence[int]],
    room: float,
    pad: int,
    normaliser: float,
) -> TokenBatch:
    """A packed batch; what is left of a sequence is padded on the right.

    Args:
        read: (B,) tokens of each row.
        said: (B,) what the last of a row's tokens should say next, ``NO_LOSS`` for nothing.
        room: tokens of a sequence.
        pad: fills it up.
        normaliser: of the loss.
    """
    places = bins([len(ids) for ids in read], room)
    shape = (len(places), max(sum(len(read[row]) for row in rows) for rows in places))
    tokens, answers = np.full(shape, pad), np.full(shape, NO_LOSS)  # (S, L)
    mask, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for place, rows in enumerate(places):
        start = 0
        for row in rows:
            stop = start + len(read[row])
            tokens[place, start:stop] = read[row]
            answers[place, stop - len(said[row]) : stop] = said[row]
            positions[place, start:stop] = np.arange(stop - start)
            mask[place, start:stop] = 1
            start = stop
        positions[place, start:] = np.arange(shape[1] - start)
    columns = np.flatnonzero((answers != NO_LOSS).any(0))  # (A,)
    if not len(columns):  # rows that only keep ranks in step
        columns = np.array([shape[1] - 1])
    made = (tokens, mask, answers[:, columns], np.float32(normaliser), positions, columns)
    return TokenBatch(*map(torch.as_tensor, made))


def rows_apart(positions: Tensor) -> Tensor:
    """(S, 1, L, L) whether a token sees another: of its own row, and not after it.

    Args:
        positions: (S, L), 0 where a row, or the padding, begins.
    """
    row = (positions == 0).cumsum(-1)  # (S, L)
    return (row[:, None, :, None] == row[:, None, None, :]).tril()


def packed_logits(
    model: Any, tokens: Tensor, positions: Tensor, columns: Tensor, attention: Attention
) -> Tensor:
    """Logits (S, A, V) float32 at columns (A,) of packed rows; the head runs on no other.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        tokens: (S, L).
        positions: (S, L), from 0 in each row.
        columns: (A,).
        attention: of the model. ``flash_attention_2`` takes no mask: transformers tells rows by their
            positions, in one sequence (S = 1).
    """
    mask: Any = None
    if attention != "flash_attention_2":
        mask = attention_mask(model, rows_apart(positions), positions, positions)
    out = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=columns,
        use_cache=False,
    )
    logits: Tensor = out.logits.float()
    return logits


@torch.no_grad()
def require_rows_apart(model: Any, attention: Attention) -> None:
    """Refuse a model that lets a row see the one before it.

    Args:
        model: as in ``packed_logits``.
        attention: likewise.

    Raises:
        ModelError: it does. Some models take no mask, or have layers without attention.
    """
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=model.device)
    columns = torch.tensor([4, 5, 6], device=model.device)
    found = []
    for before in ([1, 2, 3, 4], [9, 8, 7, 6]):
        tokens = torch.tensor([[*before, 5, 1, 3]], device=model.device)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)  # the same dropout
            found.append(packed_logits(model, tokens, positions, columns, attention))
    if (found[0] - found[1]).abs().max() > _FOREIGN * found[0].std():
        raise ModelError(
            "this language model lets packed rows see one another: set packing=false, or another "
            "llm.attention"
        )
