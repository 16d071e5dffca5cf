"""What of a language model is trained: adapters, all of it, or nothing. The only place with PEFT.

What is trained is float32 whatever the model is kept in: steps of a small learning rate are below bfloat16's
rounding, and would be lost. Adapters are stored in PEFT's own format, so that plain PEFT reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.sources import DataSourceError
from lightning_modules.errors import ModelError
from lightning_modules.llm.masks import refuse_prefix
from lightning_modules.llm.sharding import whole
from lightning_modules.llm.specs import LORA, AdapterSpec
from lightning_modules.llm.targets import ia3_paths, linear_paths

__all__ = [
    "AdapterSpec",
    "adapter_is_untrained",
    "attach_adapter",
    "load_adapter",
    "merged",
    "save_adapter",
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def attach_adapter(model: Any, spec: AdapterSpec, seed: int) -> Any:
    """The model, changed in place, with only what ``spec`` names trainable.

    Args:
        model: from ``load_causal_lm``.
        spec: which adapter.
        seed: of its initial weights; the random streams are left as they were.

    Returns:
        A ``PeftModel``, or ``model`` itself for ``full`` and ``none``. What is trained is float32 and in
        training mode (its dropout works), what is frozen in eval mode.

    Raises:
        ModelError: a target names no layer, a method's own layers are not there, a quantized model is to be
            trained in full, or see ``refuse_prefix``.
    """
    model.requires_grad_(False)
    if spec.method == "none":
        return model
    if spec.method == "full":
        if any(_packed(p) for p in model.parameters()):
            raise ModelError(
                "adapter full trains every weight, but the model is quantized: take lora, "
                "or set quantization=null."
            )
        return _in_float32(model.requires_grad_(True).train())
    if spec.method == "dora" and any(type(p).__name__ == "Int8Params" for p in model.parameters()):
        raise ModelError(
            "adapter dora does not work on int8 weights (bitsandbytes 0.50 loses their scales): "
            "take quantization nf4, or lora."
        )
    from peft import get_peft_model

    config = _config(model, spec)
    with _own_randomness():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    return _in_float32(adapted)


def adds_embeddings(model: Any) -> bool:
    """Whether an adapter of a model is trained vectors before the text (prompt tuning)."""
    settings = getattr(model, "active_peft_config", None)
    return settings is not None and settings.peft_type == "PROMPT_TUNING"


def adds_tokens(model: Any) -> bool:
    """Whether an adapter of a model is trained vectors before the text, or keys and values of such."""
    settings = getattr(model, "active_peft_config", None)
    return settings is not None and bool(settings.is_prompt_learning)


def behind_virtual_tokens(
    model: Any, tokens: Tensor, mask: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``model.base_model`` reads: the trained vectors and, right behind them, the text.

    PEFT leaves positions out here, so that a row's padding would stand between the two and move its scores.

    Args:
        model: one that ``adds_embeddings``.
        tokens, mask, positions: (B, L) of the text, padded on the left.

    Returns:
        Embeddings (B, P + L, H), a mask (B, P + L) that is 0 at padding, and positions (B, P + L).
    """
    vectors = model.get_prompt(batch_size=len(tokens))  # (B, P, H)
    text = model.get_input_embeddings()(tokens)  # (B, L, H)
    count = vectors.shape[1]
    before = torch.arange(count, device=tokens.device).expand(len(tokens), -1)  # (B, P)
    return (
        torch.cat([vectors.to(text.dtype), text], dim=1),
        torch.cat([mask.new_ones(len(tokens), count), mask], dim=1),
        torch.cat([before, positions + count], dim=1),
    )


def _config(model: Any, spec: AdapterSpec) -> Any:
    """PEFT's own description."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

    if spec.method in LORA:
        return LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout,  # type: ignore[arg-type]
            target_modules=linear_paths(model, spec.targets, spec.last_layers), task_type="CAUSAL_LM",
            use_rslora=spec.method == "rslora", use_dora=spec.method == "dora",
        )  # fmt: skip
    if spec.method == "ia3":
        paths, feedforward = ia3_paths(model, spec.targets, spec.last_layers)
        return IA3Config(
            target_modules=paths, task_type="CAUSAL_LM", feedforward_modules=feedforward
        )
    if spec.method == "prefix":
        refuse_prefix(model)
    kind = PromptTuningConfig if spec.method == "prompt" else PrefixTuningConfig
    return kind(num_virtual_tokens=spec.num_virtual_tokens, task_type="CAUSAL_LM")


def _packed(parameter: Tensor) -> bool:
    """Whether a parameter is kept in 4 or 8 bits."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def _own_randomness() -> AbstractContextManager[None]:
    """The random streams of all devices are put back at the end."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _in_float32(adapted: Any) -> Any:
    """The model, what is trainable of it in float32."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the adapter as PEFT does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        TypeError: the model has no adapter.
    """
    _require_adapter(model)
    # PEFT would otherwise ask the model hub whether the vocabulary has grown.
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def load_adapter(model: Any, folder: str | Path, trainable: bool = False) -> Any:
    """The model, changed in place, with the adapter that ``save_adapter``, or PEFT, has written.

    Args:
        model: from ``load_causal_lm``, of the backbone that the adapter was trained on.
        folder: where it lies.
        trainable: go on training it.

    Raises:
        DataSourceError: the folder holds no adapter, or one of other weights than this model's.
        ModelError: see ``refuse_prefix``.
    """
    from peft import PeftConfig, PeftModel

    folder = Path(folder)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise DataSourceError(
            f"{folder} has no {' and no '.join(missing)}: name a folder that save_adapter has written."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type == "PREFIX_TUNING":
            refuse_prefix(model)
        # PEFT refuses to load prompt and prefix vectors as trainable, and then leaves them so.
        option = trainable and not config.is_prompt_learning
        with _own_randomness():
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=option)
    except ModelError:
        raise
    except (
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:  # other shapes, or layers that are not there
        reason = str(error).strip().splitlines()[0]
        raise DataSourceError(
            f"the adapter in {folder} does not fit the model ({reason})."
        ) from error
    _require_same_names(adapted, folder)
    adapted = _in_float32(adapted)
    return adapted if trainable else adapted.requires_grad_(False).eval()


def _require_same_names(adapted: Any, folder: Path) -> None:
    """PEFT only warns of weights that the file lacks, and drops those that it has too many of."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    expected = set(peft_weights(adapted))
    if odd := sorted(stored ^ expected):
        raise DataSourceError(
            f"the adapter in {folder} does not fit the model: {odd[0]} is "
            f"{'unknown to the model' if odd[0] in stored else 'missing from the file'}."
        )


def peft_weights(model: Any, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's weights by the names that PEFT's files have; ``given`` replaces all of them first.

    Raises:
        TypeError: the model has no adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _require_adapter(model)
    if given is not None:
        set_peft_model_state_dict(model, given)
        _in_float32(model)
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights


def peft_settings(model: Any) -> dict[str, Any]:
    """What two adapters must have in common beside their weights' names, as ``adapter_config.json`` has it.

    Raises:
        TypeError: the model has no adapter.
    """
    _require_adapter(model)
    config = model.peft_config["default"].to_dict()
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern")
    return {"peft_type": config["peft_type"].value, **{n: config[n] for n in names if n in config}}


def merged(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A plain model whose weights hold the adapter; ``model`` is taken apart for it.

    Quantized weights are unpacked into ``dtype`` first: PEFT would quantize the sum again, and lose most of
    what was learned. The result computes what was trained, up to rounding, without bitsandbytes; with int8
    also up to the rounding of activations, which bitsandbytes keeps in 8 bits there, too.

    Raises:
        TypeError: the model has no adapter, or one that is no part of a weight (prompt, prefix).
    """
    _require_adapter(model)
    config = model.peft_config["default"]
    if config.is_prompt_learning:
        raise TypeError(f"{config.peft_type.value} adds tokens, not weights: it cannot be merged.")
    if not any(_packed(p) for p in model.parameters()):
        return model.to(dtype).merge_and_unload(safe_merge=True)
    from peft import get_peft_model, set_peft_model_state_dict

    learned = peft_weights(model)
    # PEFT's layers that wrap quantized ones cannot take others: the plain model is adapted anew.
    plain = _stripped(model).dequantize(dtype).to(dtype)
    with _own_randomness():
        again = get_peft_model(plain, config)
    set_peft_model_state_dict(again, learned)
    return again.to(dtype).merge_and_unload(safe_merge=True)


def _stripped(model: Any) -> Any:
    """The model below an adapter, without it. PEFT's own ``unload`` refuses (IA)3 on quantized weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = model.get_base_model()
    wrapped = [(n, m) for n, m in plain.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in wrapped:
        plain.set_submodule(name, layer.get_base_layer())
    for mark in (
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
    ):  # transformers would leave them standing
        vars(plain).pop(mark, None)
    return plain


def adapter_is_untrained(model: Any) -> bool:
    """Whether an adapter still changes nothing: all of LoRA's B are zero, or all (IA)3 scales are one.

    Raises:
        TypeError: the model has no adapter, or one that has no such start (prompt, prefix).
    """
    _require_adapter(model)
    parts = list(_started(model))
    if not parts:
        raise TypeError("whether prompt or prefix vectors were trained cannot be read off them.")
    return all(bool((whole(weight) == start).all()) for weight, start in parts)


def _started(model: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """Each weight that begins as a constant, with it."""
    for name, parameter in model.named_parameters():
        for mark, start in ((".lora_B.", 0.0), (".lora_embedding_B.", 0.0), (".ia3_l.", 1.0)):
            if mark in name:
                yield parameter.detach(), start


def _require_adapter(model: Any) -> None:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"{type(model).__name__} has no adapter: attach one with attach_adapter, or load_adapter."
        )
