"""Adapters that begin where another fit has ended: from a folder in PEFT's format, or from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from datamodules.sources import DataSourceError
from lightning_modules.llm.adapters import CONFIG, WEIGHTS, peft_settings, peft_weights
from lightning_modules.llm.reloading import Reloaded
from lightning_modules.llm.sharding import whole
from lightning_modules.llm.specs import AdapterSpec

SPEC = "adapter"  # the key of a checkpoint that holds the fields of its AdapterSpec
_LISTED = 6  # names of layers in a message
# PEFT's beginnings of LoRA that also move what is frozen: the adapter is one of those moved weights.
_MOVING = ("pissa", "corda", "olora", "loftq", "lora_ga")


def start_adapter(module: Any, path: Path) -> Reloaded | None:
    """Give the adapter of ``module`` the weights that lie in ``path``; it is trained as before.

    Args:
        module: a ``LanguageModelModule`` with its model.
        path: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``, or a checkpoint.

    Returns:
        What must be found again where these weights are used as they are; None of a folder, which does not
        tell.

    Raises:
        DataSourceError: there is no such adapter, it cannot be read, or it is another kind of adapter: other
            rank, alpha or layers, or frozen weights that its beginning has moved. All differences are named.
        ModelError: a checkpoint is damaged, see ``Reloaded``.
    """
    model, spec = module.model, module.adapter
    if path.is_dir() and spec.method == "full":
        raise DataSourceError(
            f"{path} is a folder of an adapter, but adapter full trains the weights themselves: start from a "
            "checkpoint of such a fit."
        )
    own, stored = _paired(model, path)
    found = [*_other_settings(model, spec, path), *_other_layers(set(stored), set(own))]
    if not found:
        found = list(_other_shapes(_shapes(stored), _shapes(own)))
    if found:
        raise DataSourceError(
            f"the adapter in {path} is not of the kind that is trained here: {'; '.join(found)}. Set "
            "module.adapter to what was trained there, or start from another."
        )
    if path.is_dir():
        peft_weights(model, stored)
        return None
    read = Reloaded.of(path, _checkpoint(path), module)
    with torch.no_grad():
        for name, weight in stored.items():
            own[name].copy_(weight)
    return read


def starts_like(model: Any, path: Path) -> bool:
    """Whether the adapter of ``model`` still has the very weights of ``path``."""
    own, stored = _paired(model, path)
    return all(torch.equal(whole(own[n]).cpu(), w.to(own[n].dtype)) for n, w in stored.items())


def _paired(model: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained weights of ``model`` and those of ``path``, by the names that the file gives them."""
    if path.is_dir():
        try:
            return peft_weights(model), load_file(path / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise DataSourceError(
                f"{path} has no readable {WEIGHTS}: name a folder in PEFT's format (old .bin files are not "
                "read, as they may run code)."
            ) from error
    # Tied weights have several names, and a checkpoint all of them.
    named = model.named_parameters(remove_duplicate=False)
    own = {name: weight.data for name, weight in named if weight.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    state = {n.removeprefix("model."): w for n, w in _checkpoint(path)["state_dict"].items()}
    return own, {n: w for n, w in state.items() if n not in buffers}


def _checkpoint(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by how the file is damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataSourceError(
            f"{path} is neither an adapter's folder nor a checkpoint that can be read ({reason})."
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise DataSourceError(f"{path} is no checkpoint: it has no state_dict.")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataSourceError(
            f"{path} cannot be read ({error}): name a folder in PEFT's format."
        ) from error
    if not isinstance(found, dict):
        raise DataSourceError(f"{path} is no JSON object: name a folder in PEFT's format.")
    return found


def _other_settings(model: Any, spec: AdapterSpec, path: Path) -> Iterator[str]:
    """What must agree and cannot be read off the weights (and the rank, which is easier said than shapes)."""
    if path.is_dir():
        own, stored = peft_settings(model), _json(path / CONFIG)
        begun = str(stored.get("init_lora_weights")).lower()
        if begun.startswith(_MOVING):
            yield (
                f"its init_lora_weights is {begun}, which has moved the frozen weights, too (PEFT's "
                "save_pretrained writes it without, given path_initial_model_for_weight_conversion)"
            )
    else:
        lora = spec.method in ("lora", "rslora", "dora")
        names = ("method", "rank", "alpha") if lora else ("method",)
        own = {name: getattr(spec, name) for name in names}
        stored = _checkpoint(path).get(SPEC) or own  # one of older code does not say
    for name, value in own.items():
        theirs = stored.get(name, type(value)())  # older files lack what was off
        if theirs != value:
            yield f"its {name} is {theirs}, here {value}"


def _other_layers(stored: set[str], own: set[str]) -> Iterator[str]:
    for text, names in (("it also adapts", stored - own), ("it does not adapt", own - stored)):
        if layers := sorted({_layer(name) for name in names}):
            more = f" and {len(layers) - _LISTED} more" if len(layers) > _LISTED else ""
            yield f"{text} {', '.join(layers[:_LISTED])}{more}"


def _other_shapes(
    stored: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """The first weight of another shape: the language model is another one."""
    for name in sorted(stored):
        if stored[name] != own[name]:
            yield f"{name} is {stored[name]}, here {own[name]}"
            return


def _layer(name: str) -> str:
    """``q_proj`` of a name of LoRA's A or B or (IA)3's scale of it; any other name is its own layer."""
    before = next((name.partition(m)[0] for m in (".lora_", ".ia3_") if m in name), name)
    return name if before == name else before.rpartition(".")[2]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}
