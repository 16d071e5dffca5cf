"""Many ways to go on behind each prompt, read in parallel: a prompt is read once, whatever their number.

The branches of a prompt stand one after another behind it; a mask lets each see the prompt and itself alone,
and its places go on where the prompt ends. What is read off is the logits at each branch's end.

Legend: B rows, C branches of each, P prompt tokens, S tokens of branches, N token ids that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.errors import ModelError
from lightning_modules.llm.attention import TAKE_MASKS
from lightning_modules.llm.label_scoring import SharedPrefix, only_tokens
from lightning_modules.llm.masks import attention_mask, layer_windows, padding_mask
from lightning_modules.llm.pictures import positions_of

Tokens = Sequence[int]
# What else a pass is given, such as pictures, for its branches as (row, branch) in the order of their tokens.
Beside = Callable[[list[tuple[int, int]]], dict[str, Any]]
AT_ONCE = 512  # tokens of branches behind a prompt in one pass: a token sees no other branch, but pays for it
_ENDS = 512  # branch ends in one pass, over all rows: each costs a row of logits


class SideBySide(NamedTuple):
    """Some branches of each row, one after another; they end in the same columns in all rows."""

    tokens: Tensor  # (B, S)
    places: Tensor  # (B, S) of a token in its own branch
    segment: Tensor  # (B, S) which branch of the pass, -1 = padding
    ends: Tensor  # (C,) columns
    branches: Tensor  # (B, C) which of the row's branches they are


def side_by_side(
    branches: Sequence[Sequence[Tokens]], pad: int, at_once: int = AT_ONCE
) -> Iterator[SideBySide]:
    """Passes that hold all branches (B) x (C), each row's longest first, so that rows align with few gaps.

    Raises:
        ValueError: a branch has no token, or rows have different numbers of branches.
    """
    lengths = torch.tensor([[len(branch) for branch in row] for row in branches])  # (B, C)
    if lengths.numel() and int(lengths.min()) == 0:
        raise ValueError("every branch needs at least one token")
    order = lengths.argsort(dim=1, descending=True, stable=True)  # (B, C)
    widths = lengths.gather(1, order).amax(0).tolist()  # (C,) of each slot over all rows
    most = max(1, _ENDS // len(branches))
    first = 0
    while first < len(widths):
        last, total = first, 0
        while last < len(widths) and last - first < most and total + widths[last] <= at_once:
            total += widths[last]
            last += 1
        last = max(last, first + 1)  # a branch that is longer than a pass has one of its own
        yield _laid_out(branches, order[:, first:last], widths[first:last], pad)
        first = last


def _laid_out(
    branches: Sequence[Sequence[Tokens]], chosen: Tensor, widths: Sequence[int], pad: int
) -> SideBySide:
    ends = torch.tensor(widths).cumsum(0)  # (C,) one past each slot
    shape = (len(branches), int(ends[-1]))
    tokens, places = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    segment = torch.full(shape, -1)
    for row, own in enumerate(chosen.tolist()):
        for slot, (branch, end) in enumerate(zip(own, ends.tolist(), strict=True)):
            ids = branches[row][branch]
            here = slice(end - len(ids), end)
            tokens[row, here] = torch.as_tensor(ids, dtype=torch.long)
            places[row, here] = torch.arange(len(ids))
            segment[row, here] = slot
    return SideBySide(tokens, places, segment, ends - 1, chosen)


def can_branch(model: Any) -> bool:
    """Whether a model takes a mask of our own: its attention is sdpa or eager, its layers are known."""
    known = layer_windows(model) is not None
    return known and getattr(model.config, "_attn_implementation", "sdpa") in TAKE_MASKS


class ReadPrompts:
    """Prompts that have been read, each of which can be gone on with in many ways.

    Args:
        model: a causal language model of transformers, with or without an adapter that adds no tokens; its
            weights must not move while this is used.
        tokens: (B, P), padded on the left.
        mask: (B, P), 1 at tokens.
        prefix: what they all begin with, where that has been read; each has more.

    Raises:
        ModelError: the model takes no mask of our own (``can_branch``).
    """

    def __init__(
        self, model: Any, tokens: Tensor, mask: Tensor, prefix: SharedPrefix | None = None
    ) -> None:
        from transformers import DynamicCache

        if not can_branch(model):
            raise ModelError(
                "this language model takes no mask of our own, so that a prompt cannot be shared: take "
                "llm.attention=sdpa"
            )
        self.model, known = model, 0 if prefix is None else prefix.length
        self.length = mask.sum(-1, keepdim=True)  # (B, 1)
        self.places = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, P)
        # A cache of the model's own would drop what its windows no longer see at the prompt's end.
        read: Any = DynamicCache()
        if prefix is not None:
            read = prefix.cache(len(tokens))
            tokens, mask, self.places = prefix.behind(tokens, mask)
        self.mask = mask.bool()  # (B, P)
        model(
            input_ids=tokens,
            attention_mask=padding_mask(model, mask, self.places, known),
            position_ids=self.places[:, known:],
            past_key_values=read,
            use_cache=True,
            logits_to_keep=1,
        )
        # Keys and values (B, heads, P, d) of each layer: transformers' caches grow in place.
        self.states = [(layer.keys, layer.values) for layer in read.layers]

    def end_logits(
        self,
        branches: Sequence[Sequence[Tokens]],
        ids: Tokens,
        pad: int,
        at_once: int = AT_ONCE,
        beside: Beside | None = None,
    ) -> Tensor:
        """Logits (B, C, N) float32 of the tokens ``ids`` at the end of each branch.

        Args:
            branches: (B) lists of C token sequences, the same number in each row.
            ids: (N,) tokens that are asked about.
            pad: fills gaps.
            at_once: tokens a pass, see ``side_by_side``.
            beside: what else the model is given.
        """
        device = self.mask.device
        found = torch.zeros(len(branches), len(branches[0]), len(ids), device=device)
        for part in side_by_side(branches, pad, at_once):
            rows = enumerate(part.branches.tolist())
            shown = [(row, branch) for row, own in rows for branch in own] if beside else []
            given = beside(shown) if beside else {}
            moved = SideBySide(*(t.to(device) for t in part))
            with only_tokens(self.model, ids):
                logits = self._read(moved, given)  # (B, C, N)
            to = part.branches.to(device)[..., None].expand_as(logits)
            found.scatter_(1, to, logits)
        return found

    def _read(self, part: SideBySide, beside: dict[str, Any]) -> Tensor:
        """Logits (B, C, V) of one pass."""
        from transformers import DynamicCache

        same = part.segment[:, :, None] == part.segment[:, None, :]  # (B, S, S)
        earlier = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
        own = torch.eye(same.shape[1], dtype=torch.bool, device=same.device)
        real = part.segment >= 0  # (B, S)
        # A row of a softmax must not be empty: padding reads itself, and nobody reads padding.
        inside = (same & earlier & real[:, None]) | own  # (B, S, S)
        before = self.mask[:, None].expand(-1, same.shape[1], -1)  # (B, S, P)
        seen = torch.cat([before, inside], dim=2)[:, None]  # (B, 1, S, P + S)
        places = self.length + part.places  # (B, S)
        spaced = "image_grid_thw" in beside
        logits: Tensor = self.model(
            input_ids=part.tokens,
            attention_mask=attention_mask(
                self.model, seen, places, torch.cat([self.places, places], dim=1)
            ),
            position_ids=self.length + self._pictured(part, beside) if spaced else places,
            past_key_values=DynamicCache(self.states),
            logits_to_keep=part.ends,
            use_cache=True,
            **beside,
        ).logits
        return logits

    def _pictured(self, part: SideBySide, beside: dict[str, Any]) -> Tensor:
        """(3, B, S) of a token in its own branch, where image tokens have places in three dimensions.

        A prompt of text alone is as long as it has tokens, so that its branches' places are counted on.
        """
        rows, slots = part.branches.shape
        mine = part.segment[:, None] == torch.arange(slots, device=part.segment.device)[:, None]
        tokens = (
            part.tokens[:, None].expand_as(mine).flatten(0, 1)
        )  # (B * C, S) a row for each branch
        mask = mine.flatten(0, 1).long()
        image = (tokens == self.model.config.image_token_id) & mask.bool()
        asked = {
            "input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": image.int(),
            "image_grid_thw": beside["image_grid_thw"],
        }  # fmt: skip
        found = positions_of(self.model, asked) * mask  # (3, B * C, S)
        return found.unflatten(1, (rows, slots)).sum(2)
