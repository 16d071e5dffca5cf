"""What the modules that write texts share: nothing is written twice, and nothing is trained.

Legend: B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import lightning.pytorch as pl

from datamodules.sources import file_digest
from datamodules.types import Collator
from lightning_modules.generations import Generations
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.llm.backbones import resolve_dtype
from lightning_modules.llm.generation import generate
from lightning_modules.llm.sharding import ShardedStrategy
from lightning_modules.llm.yes_no import YesNoCollator
from lightning_modules.tallrec.module import TALLRecModule


class WritingModule(TALLRecModule):
    """Base of the modules that write texts: each once, and kept by ``callbacks/generations.py``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.generations = Generations()

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """No loss goes through a text that was chosen word by word."""
        return (
            f"{type(self).__name__} writes texts and trains nothing: use it in a `run: test` stage"
        )

    def sharded_strategy(self, devices: int) -> ShardedStrategy:
        """None: split layers run on all devices or none, and answers end after unlike numbers of words.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} writes texts, which weights that are spread over devices cannot: run "
            "its stage with launch.strategy=ddp or on one device"
        )

    @cached_property
    def _writer(self) -> str:
        """A digest of the model that writes, and of the type that it computes in here."""
        weights = file_digest(self._weights) if self._weights else ""
        dtype = resolve_dtype(self.llm, self.device)
        return hashlib.sha256(
            f"{self.llm.digest()} {dtype} {self.adapter!r} {weights}".encode()
        ).hexdigest()

    def write(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of prompts (B,), at most so many tokens each."""
        return self._generations().answers(
            prompts,
            f"greedy {max_new_tokens} {self._writer}",
            lambda asked: generate(self.model, self.tokenizer, asked, max_new_tokens),
        )

    def _generations(self) -> Generations:
        assert self.generations is not None
        return self.generations

    def said(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def collator(self, training: bool) -> Collator:
        """Prompts alone: what both labels begin with does not stand right behind them."""
        labels = replace(self.answer_tokens, shared=())
        history = HistoryCollator(self.max_length)
        return YesNoCollator(history, self.table, labels, None, self.tokenizer.pad_token_id)
