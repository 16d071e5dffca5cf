"""Items whose text is like that of the history."""

from lightning_modules.item_text_similarity.module import ItemTextSimilarityModule

__all__ = ["ItemTextSimilarityModule"]
