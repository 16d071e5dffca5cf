"""Yes or no without generating: one forward pass, two logits, one float32 margin.

Legend: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import adds_embeddings, behind_virtual_tokens
from lightning_modules.llm.masks import padding_mask

NO_LOSS = -100  # in place of an answer token: nothing is foretold there


@dataclass(frozen=True)
class LabelTokens:
    """Where two labels part, as they are tokenised behind a prompt.

    The ``shared`` tokens that both begin with stand behind every prompt; at the next position ``first`` and
    ``second`` tell the labels apart.
    """

    shared: tuple[int, ...]
    first: int
    second: int
    full: tuple[tuple[int, ...], tuple[int, ...]]  # all tokens of each label


def label_tokens(
    tokenizer: Any, prompt: str, labels: Sequence[str], special_tokens: bool = True
) -> LabelTokens:
    """Tokenise ``prompt + label`` for both labels and find where they part; no id is written down by hand.

    Args:
        tokenizer: of the model that is asked.
        special_tokens: whether the tokenizer adds its own (a chat template has them in its text).
        prompt: any whole prompt of the layout: what precedes a label decides how it is cut into tokens.
        labels: the positive one, then the negative one.

    Raises:
        ModelError: the labels are not two, one begins with the other, or the prompt's end would be tokenised
            in another way before a label.
    """
    if len(labels) != 2:
        raise ModelError(f"expected two labels (yes and no), got {list(labels)}")
    before = _ids(tokenizer, prompt, special_tokens)
    ends = []
    for label in labels:
        whole = _ids(tokenizer, prompt + label, special_tokens)
        if whole[: len(before)] != before:
            raise ModelError(
                f"the prompt's end and the label {label!r} share a token: end the prompt with a line break"
            )
        ends.append(whole[len(before) :])
    same = 0
    while same < min(map(len, ends)) and ends[0][same] == ends[1][same]:
        same += 1
    if same == min(map(len, ends)):
        raise ModelError(
            f"the label {labels[0]!r} begins with {labels[1]!r}, or the other way round"
        )
    full = (tuple(ends[0]), tuple(ends[1]))
    return LabelTokens(tuple(ends[0][:same]), ends[0][same], ends[1][same], full)


def _ids(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
    return ids


def last_logits(model: Any, tokens: Tensor, mask: Tensor, keep: int = 1) -> Tensor:
    """Logits (B, keep, V) float32 at the last ``keep`` positions; the head runs on no other.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        tokens: (B, L), padded on the left.
        mask: (B, L), 1 at tokens.
        keep: positions from the end.
    """
    # Counted from the first token, not from the padding: a row's scores do not know its neighbours' lengths.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, L)
    read: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if adds_embeddings(model):
        embedded, real, positions = behind_virtual_tokens(model, tokens, mask, positions)
        read = {"inputs_embeds": embedded, "attention_mask": padding_mask(model, real, positions)}
        model = model.base_model
    out = model(
        **read,
        position_ids=positions,
        logits_to_keep=last_columns(positions, keep),
        use_cache=False,
    )
    logits: Tensor = out.logits.float()
    return logits


@contextmanager
def only_tokens(
    model: Any, ids: Sequence[int], answered: list[Tensor] | None = None
) -> Iterator[None]:
    """Within it the model's logits are those of the tokens ``ids`` (N,) alone, (..., N), float32.

    A head in bfloat16 rounds a logit of 20 to the next eighth, which ties what a margin should tell apart.
    The states that come to it are taken as they are.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        ids: the tokens.
        answered: of each pass takes a bool (...): whether the token that greedy writing would choose there,
            of the whole vocabulary and by the head's own rounding, is one of ``ids``.
    """
    head = model.get_output_embeddings()
    written = head.forward

    def forward(states: Tensor) -> Tensor:
        asked = torch.as_tensor(ids, device=states.device)
        if answered is not None:
            answered.append(torch.isin(written(states).argmax(-1), asked))
        bias = None if getattr(head, "bias", None) is None else head.bias[asked].float()
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), head.weight[asked].float(), bias)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def last_columns(read: Tensor, keep: int) -> Tensor:
    """(keep,) the last of the L columns of what a model reads, (B, L), as ``logits_to_keep``.

    A number in their place makes transformers slice the states, and torch then copies the head's weights for
    each row of the slice, which lies apart in memory: on a CPU that took a sixth of a training step.
    """
    return torch.arange(read.shape[1] - keep, read.shape[1], device=read.device)


def answer_losses(logits: Tensor, answers: Tensor) -> Tensor:
    """(B,) mean cross-entropy of each row's answer tokens.

    Args:
        logits: (B, A, V) at the last A positions.
        answers: (B, A), -100 = no loss; each row has one that counts.
    """
    # Logits stay as they lie in memory: over (B, V, A) torch adds up 49,152 of them with ten times the error,
    # and five times as slowly.
    each = F.cross_entropy(
        logits.flatten(0, 1), answers.flatten(), reduction="none", ignore_index=NO_LOSS
    ).view_as(answers)
    return each.sum(1) / (answers != NO_LOSS).sum(1)


class SharedPrefix:
    """What all prompts begin with (a chat's header, the instruction), read once for all of them.

    Gradients pass through it, so that a training step can share it, too: what is behind it reads its keys and
    values, and they learn from all rows at once. An adapter's dropout is then the same in all rows there.

    Args:
        model: as in ``last_logits``; its weights must not move while this is used.
        ids: (P,) tokens that every row begins with.
    """

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        self.model, self.length = model, len(ids)
        tokens = torch.tensor([list(ids)], device=model.device)
        # A cache of the model's own would drop what its windows no longer see at the prefix's end.
        read: Any = DynamicCache()
        model(input_ids=tokens, use_cache=True, past_key_values=read, logits_to_keep=1)
        # Keys and values (1, heads, P, d) of each layer: transformers' caches grow in place.
        self.states = [(layer.keys, layer.values) for layer in read.layers]

    def last_logits(self, tokens: Tensor, mask: Tensor, keep: int = 1, **beside: Any) -> Tensor:
        """Logits (B, keep, V) float32 at the last positions of rows (B, L), each longer than P + keep - 1.

        ``beside``: what else the model is given, such as pictures behind the prefix.
        """
        rest, seen, positions = self.behind(tokens, mask)
        out = self.model(
            input_ids=rest,
            attention_mask=padding_mask(self.model, seen, positions, self.length),
            position_ids=positions[:, self.length :],
            past_key_values=self.cache(len(rest)),
            logits_to_keep=last_columns(rest, keep),
            use_cache=True,
            **beside,
        )
        logits: Tensor = out.logits.float()
        return logits

    def behind(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows (B, L) what is left to read, (B, L - P), where short ones still have some of the prefix.

        And what is real and where it stands, (B, L) each, the prefix in front.
        """
        rest = tokens[:, self.length :]
        own = mask.sum(-1, keepdim=True) - self.length  # (B, 1) tokens behind the prefix
        columns = torch.arange(rest.shape[1], device=mask.device)
        kept = (columns >= rest.shape[1] - own).to(mask.dtype)  # (B, L - P)
        seen = torch.cat([kept.new_ones(len(rest), self.length), kept], dim=1)  # (B, L)
        return rest, seen, (seen.cumsum(-1) - 1).clamp(min=0)

    def cache(self, rows: int) -> Any:
        """What was read, for so many rows; it may grow."""
        from transformers import DynamicCache

        return DynamicCache([
            (keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
            for keys, values in self.states
        ])  # fmt: skip


def margin(logits: Tensor, labels: LabelTokens) -> Tensor:
    """logit(yes) - logit(no) (B,), float32, of logits (B, V): the log of the odds of the two answers alone.

    A softmax over the vocabulary and then over the two probabilities (TALLRec's code) ranks by p(yes) - p(no)
    instead, which ties saturated rows and mixes in what other tokens take.
    """
    wide = logits.float()
    return wide[:, labels.first] - wide[:, labels.second]


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) and mask (B, L) of rows of any length, the newest tokens aligned at the end."""
    width = max(map(len, rows), default=0)
    tokens = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        if len(row):
            tokens[i, width - len(row) :] = torch.as_tensor(row, dtype=torch.long)
            mask[i, width - len(row) :] = 1
    return tokens, mask
