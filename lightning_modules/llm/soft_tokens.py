"""Vectors in the place of tokens: what a language model reads at some positions is no word's embedding.

The vocabulary stays as it is. A position of such a vector holds any token's id, and what the embedding layer
says there is overwritten, so that whatever calls the model (scoring, generation) does so as ever.

Legend: B rows, L tokens, N soft tokens, H width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def soft_tokens(model: Any, where: Tensor, vectors: Tensor) -> Iterator[None]:
    """Meanwhile ``model`` reads ``vectors`` where its input has them; gradients reach ``vectors``.

    Args:
        model: of transformers, with or without an adapter that adds no tokens.
        where: (B, P) bool. Inputs begin with these columns; further columns, such as candidates behind a
            prompt, are read as they are, and so is an input that is shorter, such as a token that is being
            generated.
        vectors: (N, H), row after row of ``where``.

    Raises:
        ValueError: there are more or fewer vectors than positions.
    """
    row, column = where.nonzero(as_tuple=True)  # (N,) each
    if len(row) != len(vectors):
        raise ValueError(f"{len(vectors)} vectors for {len(row)} positions")

    def overwrite(layer: Any, inputs: Any, found: Tensor) -> Tensor:
        if found.shape[0] != where.shape[0] or found.shape[1] < where.shape[1]:
            return found
        return found.index_put((row, column), vectors.to(found.dtype))

    hook = model.get_input_embeddings().register_forward_hook(overwrite)
    try:
        yield
    finally:
        hook.remove()
