"""Items as "key value key value" tokens, and histories as the tokens of their items, newest first.

Legend: B rows, T history length, I items, L tokens of a row, N tokens of the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from lightning_modules.item_texts import item_texts
from lightning_modules.llm.wording import token_ids

CLS, KEY, VALUE = (
    0,
    1,
    2,
)  # token types; the released code's fourth is padding, which is masked here


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens, padded on the right."""

    ids: Tensor  # (B, L)
    types: Tensor  # (B, L) CLS, KEY or VALUE
    items: (
        Tensor  # (B, L) which item of the row a token is of: 1 = the newest; 0 at [CLS] and padding
    )
    mask: Tensor  # (B, L) bool, False at padding
    cut: Tensor  # (B,) bool: rows that lost tokens

    def part(self, rows: Tensor, width: int) -> Tokens:
        """Some rows, cut to ``width`` tokens."""
        return Tokens(
            self.ids[rows, :width], self.types[rows, :width], self.items[rows, :width],
            self.mask[rows, :width], self.cut[rows],
        )  # fmt: skip


class ItemTokens(nn.Module):
    """The tokens of every item, made once.

    An attribute is its key's tokens (the field's name) and its value's, ``attribute_tokens`` at most; what an
    item lacks is left out, key and all. An item without any attribute has no token.

    Args:
        catalog: columns as ``CATALOG_SCHEMA``; row i is item i + 1.
        fields: the attributes, in this order.
        tokenizer: of transformers.
        attribute_tokens: at most, of an attribute.
    """

    ids: Tensor  # (N,)
    types: Tensor  # (N,)
    first: Tensor  # (I + 1,) where an item's tokens begin
    count: Tensor  # (I + 1,) how many it has

    def __init__(
        self, catalog: pl.DataFrame, fields: Sequence[str], tokenizer: Any, attribute_tokens: int
    ) -> None:
        super().__init__()
        self.cls, self.pad = int(tokenizer.cls_token_id), int(tokenizer.pad_token_id)
        ids: list[list[int]] = [[] for _ in range(len(catalog) + 1)]
        types: list[list[int]] = [[] for _ in range(len(catalog) + 1)]
        for field in fields:
            texts = item_texts(catalog, [field])  # (I,)
            key = tokenizer(field, add_special_tokens=False)["input_ids"]
            made = token_ids(tokenizer, texts, truncation=True, max_length=attribute_tokens)
            for item, (text, value) in enumerate(zip(texts, made, strict=True), start=1):
                if text:
                    ids[item] += [*key, *value][:attribute_tokens]
                    types[item] += [*[KEY] * len(key), *[VALUE] * len(value)][:attribute_tokens]
        count = np.array([len(row) for row in ids])
        flat = [np.concatenate([np.array(row, np.int64) for row in rows]) for rows in (ids, types)]
        parts = {
            "ids": flat[0], "types": flat[1], "count": count, "first": np.cumsum(count) - count,
        }  # fmt: skip
        for name, values in parts.items():
            self.register_buffer(name, torch.from_numpy(values), persistent=False)

    def forward(self, items: Tensor, limit: int) -> Tokens:
        """[CLS] and the tokens of each row's items, of which what is beyond ``limit`` is left out.

        Args:
            items: (B, T) ids in the order they are read, the newest first; padding 0 has no token.
            limit: L at most.
        """
        sizes = self.count[items]  # (B, T)
        ends = sizes.cumsum(1)  # (B, T)
        total = ends[:, -1:]  # (B, 1)
        width = min(limit - 1, max(1, int(total.max())))
        column = torch.arange(width, device=items.device).expand(len(items), -1)  # (B, L - 1)
        place = torch.searchsorted(ends, column.contiguous(), right=True)
        place = place.clamp(max=items.shape[1] - 1)  # which item of the row
        real = column < total
        before = (ends - sizes).gather(1, place)
        where = self.first[items.gather(1, place)] + column - before
        where = where.masked_fill(~real, 0)
        if not len(self.ids):  # a catalogue without any text
            raise ValueError("no item has any of the attributes")
        start = items.new_zeros(len(items), 1)
        return Tokens(
            torch.cat([start + self.cls, self.ids[where].masked_fill(~real, self.pad)], 1),
            torch.cat([start + CLS, self.types[where].masked_fill(~real, CLS)], 1),
            torch.cat([start, (place + 1).masked_fill(~real, 0)], 1),
            torch.cat([torch.ones_like(start, dtype=torch.bool), real], 1),
            total[:, 0] > limit - 1,
        )
