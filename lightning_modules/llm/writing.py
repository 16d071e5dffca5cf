"""What the modules that write texts share: nothing is written twice, and nothing is trained.

Legend: B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import lightning.pytorch as pl

from datamodules.sources import file_digest
from lightning_modules.generations import Generations
from lightning_modules.llm.backbones import resolve_dtype
from lightning_modules.llm.generation import generate
from lightning_modules.llm.sharding import ShardedStrategy
from lightning_modules.llm.tuning import LanguageModelModule


class WritesTexts(LanguageModelModule):
    """A language model that writes texts, each once; ``callbacks/generations.py`` keeps them.

    Its class declares ``generations``, and its constructor sets them to ``Generations()``.
    """

    generations: Generations | None = None
    written_by = "test"  # the kind of stage that it is for

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """No loss goes through a text that was chosen word by word."""
        return (
            f"{type(self).__name__} writes texts and trains nothing: use it in a `run: {self.written_by}` "
            "stage"
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

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        behind: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Greedy continuations of prompts (B,), at most so many tokens each.

        Args:
            prompts: token ids.
            max_new_tokens: at most.
            behind: (B,) the numbers of what else each prompt stands for: of the rows whose vectors it holds.
                All prompts are then of different rows, and are written anew where any is not known.
        """
        named = (
            prompts if behind is None else [[*p, n] for p, n in zip(prompts, behind, strict=True)]
        )

        def write(asked: list[Sequence[int]]) -> list[list[int]]:
            whole = prompts if behind is not None else asked
            made = generate(self.model, self.tokenizer, whole, max_new_tokens)
            place = {tuple(name): at for at, name in enumerate(named)}
            return made if behind is None else [made[place[tuple(name)]] for name in asked]

        assert self.generations is not None
        return self.generations.answers(named, f"greedy {max_new_tokens} {self._writer}", write)

    def said(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
