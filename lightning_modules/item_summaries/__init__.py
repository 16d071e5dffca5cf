"""Texts of items that a language model has written: shorter ones, and ones that join words and pictures."""

from lightning_modules.item_summaries.fusion import ItemFusionModule, WorkedFusion
from lightning_modules.item_summaries.module import ItemSummariesModule

__all__ = ["ItemFusionModule", "ItemSummariesModule", "WorkedFusion"]
