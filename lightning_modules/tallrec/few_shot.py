"""In-context learning: answered training examples stand before TALLRec's question, and nothing is trained.

Legend: B rows, R training examples, K demonstrations.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import numpy as np

from datamodules.samplers import hashed_order
from datamodules.types import Rows
from lightning_modules.errors import ModelError
from lightning_modules.llm.layouts import lay_out_shown
from lightning_modules.tallrec.module import TALLRecModule
from lightning_modules.tallrec.prompts import Question

# Streams of random numbers: which likes, which dislikes, in what order.
LIKED, DISLIKED, ORDER = 301, 302, 303


def balanced_draw(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(K,) places of ``labels`` (R,) bool: half likes, half dislikes, in random order, by the seed alone.

    Raises:
        ValueError: an odd ``count``.
        ModelError: too few of a label.
    """
    if count < 2 or count % 2:
        raise ValueError(f"demonstrations are half likes, half dislikes: {count} must be even")
    halves = []
    for stream, kind in ((LIKED, True), (DISLIKED, False)):
        places = np.flatnonzero(labels == kind)
        if len(places) < count // 2:
            raise ModelError(
                f"{count} demonstrations need {count // 2} training examples of each label, but "
                f"{len(places)} are {'likes' if kind else 'dislikes'}: ask for fewer demonstrations"
            )
        halves.append(places[hashed_order(len(places), stream, seed=seed)[: count // 2]])
    drawn = np.concatenate(halves)
    return drawn[hashed_order(count, ORDER, seed=seed)]


class FewShotModule(TALLRecModule):
    """The question after K answered ones (in-context learning, the ICL rows of TALLRec's figure 3).

    The demonstrations are the same for every row, so that they are read once (``SharedPrefix``), and they are
    training examples alone. Half of them are likes: answers lean to the label that was shown more often
    (Zhao et al., "Calibrate Before Use", ICML 2021, arXiv 2102.09690).

    Args:
        demonstrations: K, even.
        seed: which training examples, and their order.
        options: see ``TALLRecModule``.

    Raises:
        ValueError: no even K of at least 2.
    """

    def __init__(self, demonstrations: int = 4, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        if demonstrations < 2 or demonstrations % 2:
            raise ValueError(
                f"demonstrations is {demonstrations}, expected an even number: half likes, half dislikes"
            )
        self.demonstrations, self.seed = demonstrations, seed

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """A row that is learned from could be one of the demonstrations."""
        return "FewShotModule shows training examples with their answers: use it in a `run: test` stage"

    def drawn_rows(self) -> Rows:
        """The demonstrations as rows (K,) of the training examples.

        Raises:
            ModelError: the data has no training examples, or too few of a label.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        examples = data.prepared.examples()
        if examples is None:
            raise ModelError(
                "the data has no training examples to show: give data.examples a recipe"
            )
        row = balanced_draw(examples.label, self.demonstrations, self.seed)
        part = examples.take(row)
        return Rows(
            data.histories, row, part.user, part.start, part.stop, 0, self.seed,
            target=part.target, label=part.label, liked_above=data.liked_above,
        )  # fmt: skip

    @cached_property
    def shown_examples(self) -> list[tuple[str, str]]:
        """(K) pairs of input and answer."""
        rows = self.drawn_rows()
        assert rows.label is not None
        yes, no = self.labels
        return [
            (self.prompt.input(self._question(rows, i)), yes if liked else no)
            for i, liked in enumerate(rows.label)
        ]

    def _laid_out(self, question: Question) -> str:
        asked = self.prompt.input(question)
        instruction = self.prompt.instruction()
        return lay_out_shown(
            self.tokenizer, self.llm.chat_template, instruction, self.shown_examples, asked
        )
