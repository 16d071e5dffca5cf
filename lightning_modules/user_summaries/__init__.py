"""What users like, written by a language model block by block of their histories."""

from lightning_modules.user_summaries.module import UserSummariesModule

__all__ = ["UserSummariesModule"]
