"""Prompts of two parts as tokens: each user's part and each item's part is cut once, then put together.

Legend: B rows, R all rows of a split, I items, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from datamodules.types import Batch, Rows
from lightning_modules.llm.label_scoring import pad_left
from lightning_modules.llm.prompt_tokens import (
    PromptTable,
    Texts,
    common_beginning,
    joined,
    some_rows,
    tokens_behind,
)
from lightning_modules.llm.yes_no import YesNoCollator

AT_ONCE = 256  # items: a tokenizer takes 150 bytes a token, and a picture may be 3,000 tokens


@dataclass(frozen=True)
class _BehindABreak:
    """A tokenizer of texts that follow a line break, whatever it would make of their beginning."""

    tokenizer: Any

    def __call__(self, texts: Sequence[str], add_special_tokens: bool) -> dict[str, Any]:
        return {"input_ids": tokens_behind(self.tokenizer, "\n", texts)}


class ItemParts:
    """Tokens of the items' parts.

    Args:
        tokenizer: of transformers.
        texts: (I + 1,) that of 0 is not read.
        special_tokens: whether the tokenizer adds its own.
        candidate_first: they stand before users' parts, not behind.
        image: the token that stands for a piece of a picture, if any is shown.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        special_tokens: bool,
        candidate_first: bool,
        image: int | None = None,
    ) -> None:
        self.first, self.image = candidate_first, image
        cut = tokenizer if candidate_first else _BehindABreak(tokenizer)
        some = (texts[at : at + AT_ONCE] for at in range(1, len(texts), AT_ONCE))
        made = [joined(cut(part, add_special_tokens=special_tokens)["input_ids"]) for part in some]
        self._flat = np.concatenate([flat for flat, _ in made])
        self.lengths = np.concatenate([[0], *(np.diff(ends) for _, ends in made)])  # (I + 1,)
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])  # (I + 2,)

    def of(self, item: int) -> np.ndarray:
        """(L,) of an internal id."""
        return self._flat[self._offsets[item] : self._offsets[item + 1]]

    @cached_property
    def beginning(self) -> list[int]:
        """Tokens that all of them begin with, before any picture, whose tokens say nothing of it."""
        found = common_beginning([self.of(i) for i in range(1, len(self.lengths))])
        return found[: found.index(self.image)] if self.image in found else found


class PairTable:
    """Tokens of users' parts, and of the prompts that they make with items' parts.

    A user's part is the same for every item: what it may have is what the longest item leaves.

    Args:
        tokenizer: of transformers.
        users: the users' parts of rows, without their oldest events.
        items: the items' parts.
        limit: tokens a user's part may have.
        name: a digest of all that users' parts depend on besides the row.
        special_tokens: whether the tokenizer adds its own.
    """

    def __init__(
        self,
        tokenizer: Any,
        users: Texts,
        items: ItemParts,
        limit: int,
        name: str,
        special_tokens: bool,
    ) -> None:
        self.items, self.limit = items, limit
        cut = _BehindABreak(tokenizer) if items.first else tokenizer
        self.users = PromptTable(cut, users, limit, name, special_tokens)

    @property
    def cut_events(self) -> int:
        """History events that did not fit, over all rows."""
        return self.users.cut_events

    def add(self, rows: Rows) -> np.ndarray:
        """Tokenise the users' parts of all rows of a split: the prompts' numbers of tokens (R,)."""
        assert rows.target is not None
        stretches = np.stack([rows.start, rows.stop], axis=1)
        _, first, each = np.unique(stretches, axis=0, return_index=True, return_inverse=True)
        lengths = self.users.add(_without_targets(some_rows(rows, first)))
        total: np.ndarray = lengths[each.reshape(-1)] + self.items.lengths[rows.target]
        return total

    def user_parts(self, rows: Rows) -> list[np.ndarray]:
        """(B,) arrays of L, of rows whatever they ask about."""
        return self.users.of(_without_targets(rows))

    def whole(self, user: np.ndarray, item: int) -> np.ndarray:
        """(L,) the prompt that a user's part and an item's part make."""
        parts = [user, self.items.of(item)]
        return np.concatenate(parts[::-1] if self.items.first else parts)

    def of(self, rows: Rows) -> list[np.ndarray]:
        """The tokens of each row's prompt, (B,) arrays of L."""
        assert rows.target is not None
        pairs = zip(self.user_parts(rows), rows.target.tolist(), strict=True)
        return [self.whole(user, item) for user, item in pairs]

    def common_prefix(self) -> list[int]:
        """Tokens that all prompts begin with; always shorter than the shortest part."""
        return self.items.beginning if self.items.first else self.users.common_prefix()


def _without_targets(rows: Rows) -> Rows:
    return replace(rows, target=np.zeros_like(rows.user))


@dataclass(frozen=True)
class PairCollator(YesNoCollator):
    """Labelled rows with their prompts; ranked rows with their users' parts alone."""

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``target`` is the item asked about, if they are labelled."""
        if rows.label is not None:
            return super().__call__(rows)
        assert isinstance(self.table, PairTable)
        parts = [ids.tolist() for ids in self.table.user_parts(rows)]
        tokens, mask = pad_left(parts, self.pad)
        weight = torch.ones(len(parts), dtype=torch.float64)
        return replace(self.history(rows), tokens=tokens, token_mask=mask, weight=weight)
