"""BERT4Rec."""

from lightning_modules.bert4rec.module import BERT4RecModule

__all__ = ["BERT4RecModule"]
