"""Pretrained language models: where they come from, and what their frozen parts compute."""

from lightning_modules.llm.backbones import SentenceEncoderSpec
from lightning_modules.llm.sentence_embeddings import encode_texts

__all__ = ["SentenceEncoderSpec", "encode_texts"]
