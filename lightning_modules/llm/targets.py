"""Which layers of a language model an adapter is put on."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_modules.errors import ModelError
from lightning_modules.llm.vision_parts import language_model_path


def linear_paths(model: Any, targets: str | tuple[str, ...] = "all-linear") -> list[str]:
    """Full names of the linear layers that ``targets`` stands for.

    The output head is none of them (its gradient is as large as the vocabulary), nor is a layer of a vision
    tower or its projector: PEFT matches the ends of names, so a bare ``q_proj`` would adapt the tower's, too.

    Raises:
        ModelError: a target names no layer; the names that exist are told.
    """
    head = model.get_output_embeddings()
    inside = language_model_path(model)
    found = [
        name
        for name, layer in model.named_modules()
        if _is_linear(layer)
        and layer is not head
        and (inside is None or name.startswith(f"{inside}."))
    ]
    if targets == "all-linear":
        chosen, unknown = found, []
    else:
        chosen = [name for name in found if last_name(name) in targets]
        unknown = sorted(set(targets) - {last_name(name) for name in chosen})
    if unknown or not chosen:
        names = ", ".join(sorted({last_name(name) for name in found}))
        missing = ", ".join(unknown) or "its targets"
        raise ModelError(f"the model has no layer called {missing}; it has {names or 'none'}.")
    return chosen


def _is_linear(layer: nn.Module) -> bool:
    # GPT-2 writes its linear layers as Conv1D; bitsandbytes' layers are Linear.
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def last_name(path: str) -> str:
    """What a layer is called in its parent."""
    return path.rpartition(".")[2]
