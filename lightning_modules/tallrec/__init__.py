"""TALLRec."""

from lightning_modules.tallrec.few_shot import FewShotModule
from lightning_modules.tallrec.listwise import ListPrompt, ListwiseModule
from lightning_modules.tallrec.module import TALLRecModule
from lightning_modules.tallrec.prompts import YesNoPrompt
from lightning_modules.tallrec.reasoning import (
    ChainOfThoughtModule,
    ReasoningPrompt,
    WrittenAnswerModule,
)

__all__ = [
    "ChainOfThoughtModule",
    "FewShotModule",
    "ListPrompt",
    "ListwiseModule",
    "ReasoningPrompt",
    "TALLRecModule",
    "WrittenAnswerModule",
    "YesNoPrompt",
]
