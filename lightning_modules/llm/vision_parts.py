"""The parts of a vision-language model: which layers are its language model, and which its projector."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.errors import ModelError

PROJECTOR = "multi_modal_projector"  # its name in the models of LLaVA's kind


def language_model_path(model: Any) -> str | None:
    """Full name of the language model's layers in a vision-language model; None in a language model.

    The output head is outside of it, as are the vision tower and what projects its states.
    """
    if not hasattr(getattr(model, "config", None), "vision_config"):
        return None
    inner = model.get_decoder()
    return next(name for name, part in model.named_modules() if part is inner)


def unquantized_paths(loader: Any, config: Any) -> list[str]:
    """Full names of the modules beside the language model, which are kept as they are, and of the head.

    Of full names: the patterns of ``llm_int8_skip_modules`` match from a name's start, or its end.

    Args:
        loader: the class of transformers that makes the model.
        config: the model's.
    """
    with torch.device("meta"):
        model = loader.from_config(config)
    path = language_model_path(model)
    assert path is not None
    parent, _, own = path.rpartition(".")
    beside = [name for name, _ in model.get_submodule(parent).named_children() if name != own]
    ends = [name for name, _ in model.named_children() if not f"{path}.".startswith(f"{name}.")]
    return [f"{parent}.{name}" for name in beside] + ends


def sparing(quantization_config: Any, paths: list[str]) -> Any:
    """A quantization that leaves these modules alone."""
    changed = copy.deepcopy(quantization_config)
    changed.llm_int8_skip_modules = paths
    return changed


def projector_of(model: Any) -> Any:
    """What projects a tower's states into the language model's embeddings.

    Raises:
        ModelError: the model has none of its own name.
    """
    for name, part in model.named_modules():
        if name.rpartition(".")[2] == PROJECTOR:
            return part
    raise ModelError(
        f"{type(model).__name__} has no projector that could be trained apart: only models of LLaVA's kind "
        "have one"
    )


def take_projector(model: Any, file: Path) -> None:
    """Put the projector of a checkpoint of ``align_vision`` in the place of the model's own.

    Raises:
        ModelError: the file holds no projector, or one of other sizes.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    mark = f"{PROJECTOR}."
    given: dict[str, Tensor] = {k.rpartition(mark)[2]: v for k, v in state.items() if mark in k}
    projector = projector_of(model)
    mine = {name: tuple(weight.shape) for name, weight in projector.state_dict().items()}
    if mine != (theirs := {name: tuple(weight.shape) for name, weight in given.items()}):
        raise ModelError(
            f"{file} holds no projector of this model (it has {theirs or 'none'}, expected {mine}): name a "
            "checkpoint of align_vision with the same llm"
        )
    projector.load_state_dict(given)
