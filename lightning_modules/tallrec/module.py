"""TALLRec as a system: an adapted language model that answers whether an item would be liked.

Legend: B rows, I items.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import polars as pl

from datamodules.types import NO_TITLE, Rows
from lightning_modules.llm.layouts import lay_out
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.yes_no import YesNoModule
from lightning_modules.tallrec.prompts import Probe, Question, YesNoPrompt, probed, shown_items


class TALLRecModule(YesNoModule):
    """Bao et al., "TALLRec: An Effective and Efficient Tuning Framework ...", RecSys 2023 (arXiv 2305.00447).

    Args:
        catalog: the items' texts, given by the runner from the data.
        llm, adapter: see ``YesNoModule``.
        prompt: what items are called; the words are in ``prompts``.
        creator: also show who made an item (an author), where the data knows.
        probe: show a history that lacks something, to learn what a finished model reads (``prompts.probed``).
        options: of the training, see ``YesNoModule``.
    """

    def __init__(
        self,
        catalog: pl.DataFrame,
        llm: BackboneSpec,
        adapter: AdapterSpec,
        prompt: YesNoPrompt | None = None,
        creator: bool = True,
        probe: Probe = "none",
        **options: Any,
    ) -> None:
        super().__init__(llm, adapter, **options)
        if probe not in get_args(Probe):
            raise ValueError(f"probe is {probe!r}, expected one of {', '.join(get_args(Probe))}")
        self.probe = probe
        self.prompt = prompt or YesNoPrompt()
        titles = ["", *catalog["title"].fill_null(NO_TITLE)]
        makers = ["", *catalog["brand"]] if creator else None
        self.shown = shown_items(titles, makers)  # (I + 1,)

    def texts(self, rows: Rows, skip: np.ndarray) -> list[str]:
        """Laid-out prompts (B,)."""
        return [self._text(rows, i, int(skip[i])) for i in range(len(rows.row))]

    def _text(self, rows: Rows, row: int, skip: int) -> str:
        assert rows.target is not None
        seed = (int(rows.user[row]), int(rows.stop[row]), int(rows.target[row]))
        return self._laid_out(
            probed(self._question(rows, row, skip), self.probe, self.prompt, seed)
        )

    def _question(self, rows: Rows, row: int, skip: int = 0) -> Question:
        """What a row shows and asks, without its ``skip`` oldest events."""
        assert rows.target is not None
        stop = int(rows.stop[row])
        start = max(int(rows.start[row]), stop - self.max_length) + skip
        items = rows.histories.items[start:stop]
        liked = np.ones(len(items), dtype=bool)
        if rows.liked_above is not None:
            assert rows.histories.ratings is not None
            liked = rows.histories.ratings[start:stop] > rows.liked_above
        return Question(
            tuple(self.shown[i] for i in items[liked]),
            tuple(self.shown[i] for i in items[~liked]),
            self.shown[int(rows.target[row])],
        )

    def _laid_out(self, question: Question) -> str:
        asked = (self.prompt.instruction(), self.prompt.input(question))
        return lay_out(self.tokenizer, self.llm.chat_template, *asked)

    def example_prompt(self) -> str:
        """A question without a history."""
        return self._laid_out(Question((), (), "X"))

    def wording(self) -> str:
        """The prompt's words, the items' names and how many events are shown."""
        parts = [
            self.example_prompt(),
            asdict(self.prompt),
            self.shown,
            self.max_length,
            self.probe,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
