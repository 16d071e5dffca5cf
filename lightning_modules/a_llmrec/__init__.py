"""A-LLMRec."""

from lightning_modules.a_llmrec.stage1 import Stage1Module

__all__ = ["Stage1Module"]
