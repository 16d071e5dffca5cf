"""Pretrained language models: where they come from, what their frozen parts compute, what of them is trained.

What needs PEFT, bitsandbytes or Lightning is imported when it is asked for.
"""

from importlib import import_module
from typing import Any

from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer, resolve_dtype
from lightning_modules.llm.sentence_embeddings import encode_texts
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec, SentenceEncoderSpec

_LAZY = {
    "QLoRAPrecision": "precision",
    "paged_adamw_8bit": "precision",
    "memory_report": "memory",
    "adapter_is_untrained": "adapters",
    "attach_adapter": "adapters",
    "load_adapter": "adapters",
    "merged": "adapters",
    "save_adapter": "adapters",
}

__all__ = [
    "AdapterSpec",
    "BackboneSpec",
    "QLoRAPrecision",
    "SentenceEncoderSpec",
    "adapter_is_untrained",
    "attach_adapter",
    "encode_texts",
    "load_adapter",
    "load_causal_lm",
    "load_tokenizer",
    "memory_report",
    "merged",
    "paged_adamw_8bit",
    "resolve_dtype",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
