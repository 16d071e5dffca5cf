"""TALLRec's questions for modules that write their answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datamodules.types import Collator
from lightning_modules.generations import Generations
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.llm.writing import WritesTexts
from lightning_modules.llm.yes_no import YesNoCollator
from lightning_modules.tallrec.module import TALLRecModule


class WritingModule(WritesTexts, TALLRecModule):
    """Base of TALLRec's modules that write texts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.generations = Generations()

    @property
    def shared_tokens(self) -> int:
        """None: whoever writes behind a prompt reads all of it."""
        return 0

    def collator(self, training: bool) -> Collator:
        """Prompts alone: what both labels begin with does not stand right behind them."""
        labels = replace(self.answer_tokens, shared=())
        history = HistoryCollator(self.max_length)
        return YesNoCollator(history, self.table, labels, None, self.tokenizer.pad_token_id)
