"""TALLRec."""

from lightning_modules.tallrec.module import TALLRecModule
from lightning_modules.tallrec.prompts import YesNoPrompt

__all__ = ["TALLRecModule", "YesNoPrompt"]
