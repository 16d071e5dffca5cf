"""Dotted keys of a configuration: walking them, and guessing which one was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists are leaves."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def nearest(word: str, known: Sequence[str]) -> str:
    """'; did you mean X?' or the empty string.

    A key given without its path (``dropout`` for ``stages.train.module.dropout``) counts as near.
    """
    leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
    leaf = word.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(word, same or known, 1, 0.0 if same else 0.6)
    close = close or [leaves[c] for c in difflib.get_close_matches(leaf, list(leaves), 1, 0.7)]
    return f"; did you mean {close[0]!r}?" if close else ""
