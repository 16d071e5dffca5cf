"""A-LLMRec."""

from lightning_modules.a_llmrec.lettered import LetteredStage2Module
from lightning_modules.a_llmrec.stage1 import Stage1Module
from lightning_modules.a_llmrec.stage2 import Stage2Module
from lightning_modules.a_llmrec.written import WrittenStage2Module

__all__ = ["LetteredStage2Module", "Stage1Module", "Stage2Module", "WrittenStage2Module"]
