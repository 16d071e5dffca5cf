"""What to run, and the little code that runs it; ``experiments.load`` answers with what is finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.loaded import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """``load`` needs torch: nothing is imported before it is asked for."""
    if name == "load":
        from experiments.loaded import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
