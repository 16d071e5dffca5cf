"""What A-LLMRec's second stage reads of frozen models: states of users, vectors of items. Computed once.

Legend: R rows of a split, I items; widths: d of collaborative vectors, l of what stage 1 made of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from datamodules.types import Histories, Rows
from lightning_modules.a_llmrec.prompts import before_target
from lightning_modules.a_llmrec.stage1 import Stage1Module
from lightning_modules.base import RankingModule
from lightning_modules.errors import ModelError
from lightning_modules.llm.prompt_tokens import some_rows
from lightning_modules.next_item import NextItemModule

ItemTokens = Literal["item", "text", "by_coldness", "collaborative", "random", "none"]
UnseenItems = Literal["own", "text"]
_ALIGNED = ("item", "text", "by_coldness")
_RANDOM = 403  # stream of random numbers
_AT_ONCE = 1024  # rows whose users are encoded together


class ReadsFrozen(RankingModule):
    """Reads users and items of frozen models, which are as in evaluation whatever is trained.

    A constructor gives ``freeze_sources`` what it was given, and keeps it under these names.
    """

    alignment: Stage1Module | None
    backbone: NextItemModule | None
    item_tokens: ItemTokens
    unseen_items: UnseenItems
    cold_share: float

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._users: dict[str, Tensor] = {}  # of each split, (R, d)
        self._items: Tensor | None = None  # (I + 1, l) or (I + 1, d)

    @property
    def collaborative(self) -> NextItemModule | None:
        """The backbone."""
        return self.backbone if self.alignment is None else self.alignment.backbone

    def impossible(self, histories: Histories) -> str | None:
        """What the alignment or its backbone cannot read."""
        part = self.alignment if self.alignment is not None else self.backbone
        return None if part is None else part.impossible(histories)

    def setup(self, stage: str) -> None:
        """The frozen parts learn what they need of the data."""
        super().setup(stage)
        for part in (self.alignment, self.backbone):
            if part is not None:
                part.setup(stage)

    def train(self, mode: bool = True) -> ReadsFrozen:
        """What is frozen stays as it is in evaluation."""
        super().train(mode)
        for part in (self.alignment, self.backbone):
            if part is not None:
                part.eval()
        return self

    def user_states(self, split: str) -> Tensor:
        """(R, d) x^u of all rows of ``train``, ``val`` or ``test``: what stands before each row's target."""
        if split not in self._users:
            assert self.collaborative is not None
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            rows = before_target(data.every_row(split))
            counts = self.histories.train_counts()
            with reading_unseen(self.unseen_items, self.alignment, counts):
                self._users[split] = user_states(self.collaborative, rows, self.device)
        return self._users[split]

    def forget_users(self, split: str) -> None:
        """Read them anew when they are asked for: other rows stand for the split."""
        self._users.pop(split, None)

    @property
    @abstractmethod
    def item_size(self) -> int:
        """l, or d of ``collaborative``."""

    def item_states(self) -> Tensor:
        """(I + 1, l) what F_I projects, or (I + 1, d) of ``collaborative``; row 0 is zero."""
        if self._items is None:
            self._items = item_states(
                self.item_tokens, self.item_size, self.histories.train_counts(), self.cold_share,
                self.alignment, self.collaborative, self.device,
            )  # fmt: skip
        return self._items


def freeze_sources(
    alignment: Stage1Module | None,
    backbone: NextItemModule | None,
    backbone_weights: str | None,
    user_token: bool,
    item_tokens: ItemTokens,
    unseen_items: UnseenItems,
) -> None:
    """Freeze them, with their weights: behind every soft token is something trained, which stays as it is.

    Raises:
        ValueError: a source or its checkpoint is missing, there are two, or a choice is unknown.
    """
    for name, choice, known in (
        ("item_tokens", item_tokens, get_args(ItemTokens)),
        ("unseen_items", unseen_items, get_args(UnseenItems)),
    ):
        if choice not in known:
            raise ValueError(f"{name} is {choice!r}, expected one of {', '.join(known)}")
    if unseen_items == "text" and alignment is None:
        raise ValueError("unseen_items=text is rebuilt by an alignment: give one")
    if alignment is not None and backbone is not None:
        raise ValueError("give alignment, which has a backbone, or backbone, not both")
    if backbone is not None:
        if backbone_weights is None:
            raise ValueError(
                "backbone needs its checkpoint: inputs: {backbone_weights: backbone/best.ckpt}"
            )
        backbone.load_weights(backbone_weights)
    frozen = alignment if alignment is not None else backbone
    if frozen is not None:
        frozen.requires_grad_(False).eval()
    elif user_token or item_tokens not in ("none", "random"):
        raise ValueError(
            "user_token and item_tokens come from an alignment or a backbone: give one, or set "
            "user_token=false and item_tokens=none"
        )
    if item_tokens in _ALIGNED and (alignment is None or not alignment.has_weights):
        raise ValueError(
            f"item_tokens={item_tokens} comes from a trained alignment: give alignment, and "
            "inputs: {alignment.weights: alignment/best.ckpt}"
        )


@torch.no_grad()
def user_states(backbone: NextItemModule, rows: Rows, device: torch.device) -> Tensor:
    """(R, d) x^u of rows whose ``stop`` is their target's place: what stands before it, and nothing else.

    A backbone without histories (LightGCN) has one vector a user, which has learned from all training events.
    """
    collate = backbone.collator(training=False)
    found = []
    with torch.autocast(device.type, enabled=False):
        for first in range(0, len(rows.row), _AT_ONCE):
            some = np.arange(first, min(len(rows.row), first + _AT_ONCE))
            batch = collate(some_rows(rows, some)).to(device)
            found.append(backbone.user_vectors(batch).float())
    return torch.cat(found)


@contextmanager
def reading_unseen(
    unseen_items: UnseenItems, alignment: Stage1Module | None, counts: np.ndarray
) -> Iterator[None]:
    """While it is open the backbone reads items that it was never trained on as ``Stage2Module`` was told.

    As their texts rebuild them, a history of another domain, whose items the backbone has never met, says
    something. Items without a text stay as they are; afterwards all are as they were.

    Args:
        unseen_items: see ``Stage2Module``.
        alignment: it rebuilds items, and has the backbone.
        counts: (I + 1,) training events of each item.

    Raises:
        ModelError: the backbone does not read its histories from its item vectors.
    """
    if unseen_items == "own" or alignment is None:
        yield
        return
    backbone = alignment.backbone
    where = backbone.item_vectors().data_ptr()
    table = next(
        (p.data for p in backbone.parameters() if p.data_ptr() == where), None
    )  # (I + 1, d)
    if table is None:
        raise ModelError(
            f"unseen_items=text needs a backbone with one item table, and {type(backbone).__name__} makes "
            "its item vectors anew: take sasrec or gru4rec, or unseen_items=own"
        )
    unseen = torch.from_numpy(counts == 0).to(table.device) & alignment.encoder.told
    unseen[0] = False
    kept = table[unseen]
    rebuilt = alignment.rebuilt_items("text")
    try:
        table[unseen] = rebuilt[unseen].to(table.dtype)
        yield
    finally:
        table[unseen] = kept


@torch.inference_mode(False)  # made in a validation, they may still be trained with
@torch.no_grad()
def item_states(
    item_tokens: ItemTokens,
    size: int,
    counts: np.ndarray,
    cold_share: float,
    alignment: Stage1Module | None,
    backbone: NextItemModule | None,
    device: torch.device,
) -> Tensor:
    """(I + 1, size) what stands for each item; row 0, and texts that are missing, are zero.

    Args:
        item_tokens: see ``Stage2Module``.
        size: l, or d of ``collaborative``.
        counts: (I + 1,) training events of each item.
        cold_share: of the items that ``by_coldness`` takes as cold; equal counts are ordered by id.
        alignment, backbone: of which one is there, where they are asked.
    """
    with torch.autocast(device.type, enabled=False):
        if item_tokens == "collaborative":
            assert backbone is not None
            vectors = backbone.item_vectors().clone()
        elif item_tokens == "random":
            # The same in a fit and in the test of what it has trained.
            draw = torch.Generator().manual_seed(_RANDOM)
            vectors = torch.rand(len(counts), size, generator=draw).to(device)
        else:
            assert alignment is not None
            vectors = _aligned(item_tokens, counts, cold_share, alignment)
    vectors = vectors.float()
    vectors[0] = 0
    return vectors


def _aligned(
    item_tokens: ItemTokens, counts: np.ndarray, cold_share: float, alignment: Stage1Module
) -> Tensor:
    if item_tokens == "item" or item_tokens == "text":
        return alignment.joint_vectors(item_tokens).clone()
    items, texts = alignment.joint_vectors("item"), alignment.joint_vectors("text")
    coldest = 1 + np.argsort(counts[1:], kind="stable")[: int(cold_share * (len(counts) - 1))]
    cold = torch.zeros(len(items), dtype=torch.bool)
    cold[torch.from_numpy(coldest)] = True
    return torch.where((cold.to(items.device) & alignment.encoder.told)[:, None], texts, items)
