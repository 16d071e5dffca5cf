"""What must hold when an adapter's weights are used, and of all weights when a fit ends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import adapter_is_untrained
from lightning_modules.llm.sharding import whole
from lightning_modules.llm.specs import AdapterSpec

_CONSTANT_START = ("lora", "rslora", "dora", "ia3")  # whose untrained weights tell that they are
# What of its settings tells one adapter of a method from another.
_SETTINGS = {
    **dict.fromkeys(("lora", "rslora", "dora"), ("rank", "alpha", "targets")),
    "ia3": ("targets",),
    **dict.fromkeys(("prompt", "prefix"), ("num_virtual_tokens",)),
}
_SAMPLE = 2**14  # numbers of a weight that a digest is made of, at most


def require_same_adapter(path: Path, stored: Mapping[str, Any] | None, own: AdapterSpec) -> None:
    """Refuse weights of another adapter: shapes tell neither alpha nor how the update is scaled by it.

    Args:
        path: of the checkpoint, for the message.
        stored: the fields of its ``AdapterSpec``; None where older code has written none.
        own: what is to take the weights.

    Raises:
        ModelError: the two differ; both are named.
    """
    if stored is None:
        return
    mine = asdict(own)
    if _compared(stored) != _compared(mine):
        raise ModelError(
            f"{path} was trained with adapter {_told(stored)}, and module.adapter is {_told(mine)}: set "
            "module.adapter to what was trained, or train anew"
        )


def _compared(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    names = _SETTINGS.get(fields["method"], ())
    values = (fields.get(name) for name in names)
    return (fields["method"], *(sorted(v) if isinstance(v, (list, tuple)) else v for v in values))


def _told(fields: Mapping[str, Any]) -> str:
    """``lora (rank 8, alpha 16, targets all-linear)``."""
    parts = []
    for name in _SETTINGS.get(fields["method"], ()):
        value = fields.get(name)
        parts.append(
            f"{name} {value if isinstance(value, (str, int, float)) else list(value or ())}"
        )
    return f"{fields['method']} ({', '.join(parts)})" if parts else str(fields["method"])


def require_source(own: AdapterSpec, source: Path | None) -> None:
    """Refuse to ask an adapter that nobody has trained; the language model alone would answer.

    Args:
        own: the adapter.
        source: where its weights come from, if from anywhere.

    Raises:
        ModelError: from nowhere.
    """
    if own.method != "none" and source is None:
        raise ModelError(
            f"adapter {own.method} was given no weights, so that the language model alone would answer: give "
            "the stage inputs: {weights: train/best.ckpt}, or set module.adapter.method=none"
        )


def require_trained(model: Any, own: AdapterSpec, source: Path | None) -> None:
    """Refuse an adapter that changes nothing, where its weights tell.

    Args:
        model: from ``attach_adapter``, with its weights.
        own: the adapter.
        source: where its weights come from, for the message.

    Raises:
        ModelError: it is as it was made.
    """
    if has_constant_start(own) and adapter_is_untrained(model):
        raise ModelError(
            f"the {own.method} adapter of {source} is untrained, so that the language model alone would "
            "answer: train it anew, or set module.adapter.method=none and give no weights"
        )


def has_constant_start(spec: AdapterSpec) -> bool:
    """Whether an adapter's weights tell that they are untrained (``adapter_is_untrained``)."""
    return spec.method in _CONSTANT_START


def digests(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """What tells whether some named weights have moved.

    Of a large weight every n-th number counts: an optimizer moves them all. Where weights are split over
    devices every rank has to ask.
    """
    return {name: _digest(weight) for name, weight in weights}


def some(weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The first, the middle and the last of named weights, of which a training moves all or none."""
    named = list(weights)
    chosen = sorted({0, len(named) // 2, len(named) - 1}) if named else []
    return [named[i] for i in chosen]


def _digest(weight: Tensor) -> str:
    flat = whole(weight.detach()).reshape(-1)
    # An odd step: one that divides a row's length would look at the same columns of all rows.
    step = -(-flat.numel() // _SAMPLE) | 1
    sample = flat[::step].contiguous()
    return hashlib.sha256(sample.view(torch.uint8).cpu().numpy().tobytes()).hexdigest()


def moved(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the weights whose ``digests`` differ."""
    return [name for name, digest in now.items() if before.get(name) != digest]


def require_frozen(before: Mapping[str, str], now: Mapping[str, str], steps: int) -> None:
    """Sound the alarm when a fit has changed what it must not; a fault of the code.

    Args:
        before: ``digests`` of frozen weights at the fit's start.
        now: after so many ``steps``.

    Raises:
        RuntimeError: a weight moved.
    """
    if names := moved(before, now):
        raise RuntimeError(
            f"{names[0]} is frozen, and has moved in {steps} steps: checkpoints hold only what is trained, "
            "so that nothing could compute again what this fit has trained"
        )
