"""Which layers of a language model an adapter is put on."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lightning_modules.errors import ModelError
from lightning_modules.llm.vision_parts import language_model_path

# (IA)3 scales keys, values and what enters the second feed-forward layer; their usual names.
_KEYS_AND_VALUES = (("k_proj", "v_proj"), ("query_key_value",))
_FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h")
_BLOCK = re.compile(r"\.(\d+)\.")  # its number in a layer's full name


def linear_paths(
    model: Any,
    targets: str | tuple[str, ...] = "all-linear",
    last_layers: int | float | None = None,
) -> list[str]:
    """Full names of the linear layers that ``targets`` stands for, of all blocks or of the last alone.

    The output head is none of them (its gradient is as large as the vocabulary), nor is a layer of a vision
    tower or its projector: PEFT matches the ends of names, so a bare ``q_proj`` would adapt the tower's, too.

    Raises:
        ModelError: a target names no layer; the names that exist are told. Or there are fewer blocks.
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
    return chosen if last_layers is None else _in_last(chosen, last_layers)


def _in_last(paths: list[str], last: int | float) -> list[str]:
    """The paths in the last so many blocks, or the last share of them; those of a block share its number."""
    numbers = [int(found[1]) if (found := _BLOCK.search(path)) else None for path in paths]
    blocks = sorted({number for number in numbers if number is not None})
    # A share is rounded down, but never to no block at all.
    count = max(1, int(round(last * len(blocks), 6))) if isinstance(last, float) else last
    if count > len(blocks):
        raise ModelError(
            f"adapter.last_layers={count}, but the model has {len(blocks)} layers: lower it, or leave it out"
        )
    return [p for p, n in zip(paths, numbers, strict=True) if n is not None and n >= blocks[-count]]


def ia3_paths(
    model: Any, targets: str | tuple[str, ...], last_layers: int | float | None = None
) -> tuple[list[str], list[str]]:
    """Full names of the layers that (IA)3 scales, and of those among them whose input it scales.

    Raises:
        ModelError: see ``linear_paths``; or a model with other layers is to be scaled as in the paper.
    """
    if not isinstance(targets, str):
        paths = linear_paths(model, targets, last_layers)
    else:
        there = {last_name(path) for path in linear_paths(model)}
        scaled = [names for names in _KEYS_AND_VALUES if there.issuperset(names)]
        second = [name for name in _FEEDFORWARD if name in there]
        if not scaled or not second:
            raise ModelError(
                "adapter ia3 scales keys, values and the second feed-forward layer, and this model has no "
                f"layers of these alone, or calls them otherwise; it has {', '.join(sorted(there))}: name "
                "layers as module.adapter.targets, or take module.adapter.method=lora"
            )
        paths = linear_paths(model, (*scaled[0], *second), last_layers)
    return paths, [path for path in paths if last_name(path) in _FEEDFORWARD]


def _is_linear(layer: nn.Module) -> bool:
    # GPT-2 writes its linear layers as Conv1D; bitsandbytes' layers are Linear.
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def last_name(path: str) -> str:
    """What a layer is called in its parent."""
    return path.rpartition(".")[2]
