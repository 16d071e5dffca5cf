"""Long item texts, said again in a sentence by a language model."""

from lightning_modules.item_summaries.module import ItemSummariesModule

__all__ = ["ItemSummariesModule"]
