"""What users like, written by a language model block by block of their histories."""

from lightning_modules.user_summaries.module import UserSummariesModule
from lightning_modules.user_summaries.prompts import WorkedNote

__all__ = ["UserSummariesModule", "WorkedNote"]
