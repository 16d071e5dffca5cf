"""Likelihoods of many candidate texts behind one prompt, in one forward pass.

The candidates stand behind the prompt one after another; a mask lets each see the prompt and itself alone,
and its positions go on where the prompt ends: the prompt is read once, whatever the number of candidates.

Legend: B rows, C candidates, P prompt tokens, S tokens behind the prompt, L = P + S, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import adds_tokens
from lightning_modules.llm.attention import TAKE_MASKS
from lightning_modules.llm.label_scoring import last_columns
from lightning_modules.llm.masks import attention_mask

Tokens = Sequence[int]


class Likelihoods(NamedTuple):
    """Natural logarithms, float32; -inf where a row has fewer candidates."""

    total: Tensor  # (B, C) log p(candidate | prompt), the sum over its tokens
    mean: Tensor  # (B, C) the same over its number of tokens


class Tree(NamedTuple):
    """A batch of prompts with their candidates behind them."""

    tokens: Tensor  # (B, L)
    positions: Tensor  # (B, L) place of each token in the text that it belongs to
    segment: Tensor  # (B, L) 0 = prompt, c + 1 = candidate c, -1 = padding
    source: (
        Tensor  # (N,) index into the B * (S + 1) kept positions that foretells each wanted token
    )
    wanted: Tensor  # (N,) token ids
    owner: Tensor  # (N,) b * C + c: whose token it is


def plant(prompts: Sequence[Tokens], candidates: Sequence[Sequence[Tokens]], pad: int) -> Tree:
    """Lay out prompts (B) and their candidates; prompts end, and candidates begin, in the same column.

    Raises:
        ValueError: a prompt or a candidate has no token, or there is no candidate.
    """
    if len(prompts) != len(candidates) or not prompts:
        raise ValueError(f"got {len(prompts)} prompts and {len(candidates)} lists of candidates")
    if any(not p for p in prompts) or any(not c for row in candidates for c in row):
        raise ValueError("every prompt and every candidate needs at least one token")
    most = max(map(len, candidates))
    if most == 0:
        raise ValueError("there is no candidate to score")
    before = max(map(len, prompts))
    # A candidate's last token foretells nothing that is wanted, so it is not read.
    behind = max(sum(len(c) - 1 for c in row) for row in candidates)
    shape = (len(prompts), before + behind)
    tokens, positions = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    segment = torch.full(shape, -1)
    source: list[int] = []
    wanted: list[int] = []
    owner: list[int] = []
    for b, (prompt, row) in enumerate(zip(prompts, candidates, strict=True)):
        tokens[b, before - len(prompt) : before] = torch.as_tensor(prompt)
        positions[b, before - len(prompt) : before] = torch.arange(len(prompt))
        segment[b, before - len(prompt) : before] = 0
        column = before
        for c, candidate in enumerate(row):
            end = column + len(candidate) - 1
            tokens[b, column:end] = torch.as_tensor(candidate[:-1], dtype=torch.long)
            positions[b, column:end] = len(prompt) + torch.arange(len(candidate) - 1)
            segment[b, column:end] = c + 1
            # Kept positions are the prompt's last one and what follows it.
            kept = [0, *range(column - before + 1, end - before + 1)]
            source += [b * (behind + 1) + k for k in kept]
            wanted += candidate
            owner += [b * most + c] * len(candidate)
            column = end
    return Tree(
        tokens, positions, segment, torch.tensor(source), torch.tensor(wanted), torch.tensor(owner)
    )


def tree_mask(segment: Tensor) -> Tensor:
    """(B, 1, L, L) whether a token sees another: earlier ones of the prompt and of its own candidate."""
    length = segment.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    reader, read = segment[:, :, None], segment[:, None, :]
    seen = earlier & ((read == 0) | (read == reader)) & (read >= 0)  # (B, L, L)
    # A row of a softmax must not be empty: padding reads itself, and nobody reads padding.
    return (seen | torch.eye(length, dtype=torch.bool, device=segment.device))[:, None]


def candidate_log_likelihoods(
    model: Any, prompts: Sequence[Tokens], candidates: Sequence[Sequence[Tokens]], pad: int
) -> Likelihoods:
    """log p(candidate | prompt) of every candidate of every row.

    Args:
        model: a causal language model of transformers, with or without an adapter, whose attention takes a
            mask (sdpa or eager).
        prompts: (B) token ids, with the special tokens that they begin with.
        candidates: (B) lists of token ids, as they follow their prompt.
        pad: any token id; padding is never read.

    Raises:
        ValueError: an empty prompt or candidate.
        ModelError: attention that takes no mask, or an adapter that stands before the text.
    """
    if adds_tokens(model):
        raise ModelError(
            "candidates are scored behind one prompt, and this adapter puts vectors of its own before it: "
            "take module.adapter.method=lora"
        )
    attention = getattr(model.config, "_attn_implementation", "sdpa")
    if attention not in TAKE_MASKS:
        raise ModelError(
            f"attention={attention} takes no mask of our own: score candidates with attention=sdpa"
        )
    tree = plant(prompts, candidates, pad)
    device, most = model.device, max(map(len, candidates))
    tokens = tree.tokens.to(device)  # (B, L)
    keep = tokens.shape[1] - max(map(len, prompts)) + 1  # S + 1
    positions = tree.positions.to(device)  # (B, L)
    logits = model(
        input_ids=tokens,
        attention_mask=attention_mask(
            model, tree_mask(tree.segment.to(device)), positions, positions
        ),
        position_ids=positions,
        logits_to_keep=last_columns(tokens, keep),
        use_cache=False,
    ).logits  # (B, S + 1, V)
    return _summed(logits.flatten(0, 1), tree, len(prompts), most)


def _summed(logits: Tensor, tree: Tree, rows: int, most: int) -> Likelihoods:
    """Each wanted token's log-probability, summed over its candidate; ``logits`` are (B (S + 1), V)."""
    source, wanted, owner = (x.to(logits.device) for x in (tree.source, tree.wanted, tree.owner))
    # Once for each kept position, not once for each candidate that begins at the prompt's end.
    mass = torch.logsumexp(logits.float(), dim=-1)  # (B (S + 1),)
    each = logits[source, wanted].float() - mass[source]  # (N,)
    total = each.new_zeros(rows * most).index_add(0, owner, each)
    count = torch.bincount(owner, minlength=rows * most)
    total = total.masked_fill(count == 0, -torch.inf).view(rows, most)
    return Likelihoods(total, total / count.clamp(min=1).view(rows, most))


@dataclass(frozen=True)
class Listed:
    """The candidates that each row's prompt lists, with their scores."""

    candidates: Tensor  # (B, C) ids, 0 = padding
    scores: Tensor  # (B, C) float32, -inf at padding

    def of(self, items: Tensor) -> Tensor:
        """Scores (B, C) of items, (C,) for all rows or (B, C).

        Raises:
            ModelError: a prompt does not list an item.
        """
        asked = items.expand(len(self.candidates), -1)  # (B, C')
        same = asked[:, :, None] == self.candidates[:, None, :]  # (B, C', C)
        if not bool(same.any(-1).all()):
            raise ModelError(
                "only candidates that a prompt lists can be scored: give data.candidates a set, such as "
                "UniformCandidates(count=19)"
            )
        return self.scores.gather(1, same.int().argmax(-1))

    def losses(self, target: Tensor) -> Tensor:
        """(B,) cross-entropy of targets (B,) among the candidates; raises ValueError as ``of`` does."""
        chosen = self.of(target[:, None])[:, 0]
        return self.scores.logsumexp(-1) - chosen


def listed_scores(
    model: Any,
    prompts: Sequence[Tokens],
    candidates: Tensor,
    texts: Sequence[Sequence[Tokens]],
    pad: int,
    normalise: bool = True,
) -> Listed:
    """Log-likelihoods of candidates' texts as scores, see ``candidate_log_likelihoods``.

    Args:
        candidates: (B, C) ids, 0 = padding.
        texts: (B) lists of C token sequences; those of padding are not read.
        normalise: the mean over a text's tokens, not their sum.
    """
    real = candidates > 0  # (B, C)
    rows = [
        [text for text, there in zip(row, mask, strict=True) if there]
        for row, mask in zip(texts, real.tolist(), strict=True)
    ]
    found = candidate_log_likelihoods(model, prompts, rows, pad)
    values = found.mean if normalise else found.total  # (B, most)
    first = torch.arange(values.shape[1], device=values.device) < real.sum(1, keepdim=True)
    scores = torch.full(real.shape, -torch.inf, device=values.device)
    scores[real] = values[first]
    return Listed(candidates, scores)
