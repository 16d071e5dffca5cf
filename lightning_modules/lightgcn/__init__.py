"""LightGCN: embeddings averaged over the graph of users and items."""

from lightning_modules.lightgcn.module import LightGCNModule

__all__ = ["LightGCNModule"]
