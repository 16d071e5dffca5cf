"""TALLRec as a system: an adapted language model that answers whether an item would be liked.

Legend: B rows, I items.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from typing import Any, get_args

import numpy as np
import polars as pl

from datamodules.types import NO_TITLE, Rows
from lightning_modules.llm.layouts import lay_out
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.wording import as_data
from lightning_modules.llm.yes_no import YesNoModule
from lightning_modules.tallrec.prompts import Probe, Question, YesNoPrompt, probed, shown_items

CALIBRATION = 128  # prompts that a rounded model is rounded by


class TALLRecModule(YesNoModule):
    """Bao et al., "TALLRec: An Effective and Efficient Tuning Framework ...", RecSys 2023 (arXiv 2305.00447).

    Args:
        catalog: the items' texts, given by the runner from the data.
        llm, adapter: see ``YesNoModule``.
        prompt: what items are called; the words are in ``prompts``. Of joined data, a prompt for each domain.
        creator: also show who made an item (an author), where the data knows.
        years: show the year that a film's title ends with.
        probe: show a history that lacks something, to learn what a finished model reads (``prompts.probed``).
        options: of the training, see ``YesNoModule``.

    Raises:
        ValueError: an unknown probe, or a domain without a prompt.
    """

    scores_new_items = True

    def __init__(
        self,
        catalog: pl.DataFrame,
        llm: BackboneSpec,
        adapter: AdapterSpec,
        prompt: YesNoPrompt | dict[str, YesNoPrompt] | None = None,
        creator: bool = True,
        years: bool = True,
        probe: Probe = "none",
        **options: Any,
    ) -> None:
        super().__init__(llm, adapter, **options)
        if probe not in get_args(Probe):
            raise ValueError(f"probe is {probe!r}, expected one of {', '.join(get_args(Probe))}")
        self.probe = probe
        self.prompts = prompt if isinstance(prompt, dict) else {"": prompt or YesNoPrompt()}
        self.prompt = next(iter(self.prompts.values()))
        several = isinstance(prompt, dict) and "domain" in catalog.columns
        self.domains = ["", *(catalog["domain"] if several else [""] * len(catalog))]  # (I + 1,)
        if lacking := set(self.domains[1:]) - set(self.prompts):
            raise ValueError(
                f"prompt has words for {', '.join(self.prompts)}, but items are of "
                f"{', '.join(map(repr, sorted(lacking)))}: give one prompt, or one for each domain"
            )
        titles = ["", *catalog["title"].fill_null(NO_TITLE)]
        makers = ["", *catalog["brand"]] if creator else None
        self._shown = shown_items(titles, makers, years)

    @cached_property
    def shown(self) -> list[str]:
        """(I + 1,) what prompts call each item; it ends neither its quotes nor the message."""
        return as_data(self._shown, self.tokenizer)

    def texts(self, rows: Rows, skip: np.ndarray) -> list[str]:
        """Laid-out prompts (B,)."""
        return [self._text(rows, i, int(skip[i])) for i in range(len(rows.row))]

    def _text(self, rows: Rows, row: int, skip: int) -> str:
        assert rows.target is not None
        seed = (int(rows.user[row]), int(rows.stop[row]), int(rows.target[row]))
        question = self._question(rows, row, skip)
        return self._laid_out(probed(question, self.probe, self._words(question), seed))

    def _words(self, question: Question) -> YesNoPrompt:
        """What the items of a question's domain are called."""
        return self.prompts.get(question.domain, self.prompt)

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
            self.domains[int(rows.target[row])],
        )

    def _laid_out(self, question: Question) -> str:
        words = self._words(question)
        asked = (words.instruction(), words.input(question))
        return lay_out(self.tokenizer, self.llm.chat_template, *asked)

    def example_prompt(self) -> str:
        """A question without a history."""
        return self._laid_out(Question((), (), "X"))

    def filled_prompts(self) -> list[str]:
        """Of each domain some prompts with several titles, with one side empty and with both, as probed."""
        histories: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
            (("A", "B", "C"), ("D", "E")), (("A",), ()), ((), ("D", "E")), ((), ()),
        ]  # fmt: skip
        return [
            self._laid_out(
                probed(Question(liked, disliked, "X", domain), self.probe, words, (1, 2, 3))
            )
            for domain, words in self.prompts.items()
            for liked, disliked in histories
        ]

    def calibration_prompts(self) -> list[str]:
        """Questions about items that were drawn, half of them liked; of no data but the items."""
        draw = np.random.default_rng(0)
        most = min(self.max_length + 1, len(self.shown) - 1)
        found = []
        for _ in range(CALIBRATION):
            *items, target = (1 + draw.choice(len(self.shown) - 1, most, replace=False)).tolist()
            liked = draw.random(len(items)) < 0.5
            names = [(self.shown[i], like) for i, like in zip(items, liked, strict=True)]
            question = Question(
                tuple(name for name, like in names if like),
                tuple(name for name, like in names if not like),
                self.shown[target],
                self.domains[target],
            )
            found.append(self._laid_out(question))
        return found

    def wording(self) -> str:
        """The prompt's words in filled examples, the items' names and how many events are shown."""
        parts = [
            self.filled_prompts(),
            {domain: asdict(words) for domain, words in self.prompts.items()},
            self.shown,
            self.max_length,
            self.probe,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
