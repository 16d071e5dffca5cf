"""Pretrained models: how they are loaded. The only place with ``from_pretrained`` for models and tokenizers.

What is described by a spec is loaded here, from safetensors only, and no code of a model's repository is
ever run. ``model_files`` says where the files come from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from datamodules.sources import DataSourceError
from lightning_modules.devices import multiplies_bfloat16
from lightning_modules.errors import ModelError
from lightning_modules.llm.attention import implementation, unusable
from lightning_modules.llm.cpu_kernels import mind_cpu_kernels
from lightning_modules.llm.model_files import first_line, mending, model_folder
from lightning_modules.llm.rounding import rounded_folder
from lightning_modules.llm.saving import save_model
from lightning_modules.llm.specs import (
    MINILM,
    SMOLLM2,
    BackboneSpec,
    DType,
    SentenceEncoderSpec,
    VisionSpec,
)
from lightning_modules.llm.vision_parts import sparing, take_projector, unquantized_paths

__all__ = [
    "MINILM",
    "SMOLLM2",
    "BackboneSpec",
    "SentenceEncoderSpec",
    "convert_gguf",
    "decoder_layers",
    "load_causal_lm",
    "load_image_processor",
    "load_sentence_encoder",
    "load_tokenizer",
    "model_folder",
    "recompute_activations",
    "resolve_dtype",
]

# Layers of a sentence-transformers folder that are written here; any other would silently be left out.
_LAYERS = {"Transformer", "Pooling", "Normalize"}
_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# Unused tokens that model makers set aside for padding.
_SPARE_PADS = (
    "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>", "<pad>",
)  # fmt: skip


def load_sentence_encoder(spec: SentenceEncoderSpec) -> tuple[Any, Any]:
    """Tokenizer and model, float32, in eval mode, without gradients, on the CPU.

    The random stream is left as it was: whether vectors are cached must not change a training run.

    Raises:
        DataSourceError: the files cannot be had or loaded, lack weights, or are of an encoder with layers
            that are not written here; or ``spec.max_length`` is more than the model reads.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder(spec.source, spec.revision)
    _require_known_layers(folder)
    with _loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, **_OFFLINE)
        model, info = AutoModel.from_pretrained(
            folder, **_OFFLINE, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    # A pooler sits on top of the states that are read.
    _require_weights(folder, {k for k in info["missing_keys"] if not k.startswith("pooler.")})
    _require_room(folder, spec.max_length, tokenizer, model.config, "sentence encoder")
    return tokenizer, model.eval().requires_grad_(False)


def resolve_dtype(spec: BackboneSpec | DType, device: torch.device | str) -> torch.dtype:
    """The type that ``spec.dtype``, or the name of a type, means on ``device``.

    ``auto`` is bfloat16 where it is multiplied natively (CUDA from compute capability 8.0, CPUs with
    AVX512_BF16 or AMX), else float32.

    Raises:
        ModelError: float16 on a CPU, where it overflows and is slower than float32.
    """
    name = spec.dtype if isinstance(spec, BackboneSpec) else spec
    device = torch.device(device)
    if name == "float16" and device.type == "cpu":
        raise ModelError("float16 is for GPUs: take auto or float32 on a CPU.")
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def load_tokenizer(spec: BackboneSpec) -> Any:
    """The tokenizer, padding on the left (the last position is then the answer's) with a token that exists.

    The pad token is the model's own, else one that it set aside, else ``unk`` (LLaMA, as TALLRec pads), else
    ``eos``; embeddings never gain a row. Padding may thus be ``eos``: mask by attention, never by this id.

    Raises:
        DataSourceError: the files cannot be had or loaded, or the model reads less than ``spec.max_length``.
        ModelError: a chat template is asked for and there is none, or nothing can be padded with.
    """
    from transformers import AutoTokenizer

    folder = model_folder(spec.source, spec.revision, convert_gguf)
    with _loading(folder):
        config = _config(folder).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(folder, **_OFFLINE, padding_side="left")
    _take_chat_template(tokenizer, folder)
    if spec.chat_template and not tokenizer.chat_template:
        raise ModelError(
            f"{folder} has no chat template: set chat_template=false, or take an instruction-tuned model."
        )
    _require_room(folder, spec.max_length, tokenizer, config, "language model")
    tokenizer.pad_token = _pad_token(tokenizer, config.vocab_size)
    return tokenizer


def _config(folder: Path) -> Any:
    """A model's configuration, of an architecture that transformers or we have."""
    from transformers import AutoConfig

    import lightning_modules.llm.efficientnet_lite  # noqa: F401  # makes itself known to AutoConfig

    return AutoConfig.from_pretrained(folder, **_OFFLINE)


def _take_chat_template(tokenizer: Any, folder: Path) -> None:
    """Older vision-language models have theirs in a file of their own, which tokenizers pass over."""
    if (file := folder / "chat_template.json").is_file():
        tokenizer.chat_template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]


def load_image_processor(spec: VisionSpec) -> tuple[Any, Any]:
    """A vision-language model's configuration, and what makes pixels of its pictures, on every machine alike.

    Raises:
        DataSourceError: the files cannot be had or loaded.
        ModelError: the model reads no pictures, or ``spec.pictures`` has a setting that its processor lacks.
    """
    from transformers import AutoImageProcessor

    folder = model_folder(spec.source, spec.revision, convert_gguf)
    with _loading(folder):
        config = _config(folder)
    if not hasattr(config, "vision_config"):
        raise ModelError(f"{folder} holds no vision-language model: name another as llm.source.")
    with _loading(folder):
        # torchvision's backend resizes otherwise, and is not everywhere.
        processor = AutoImageProcessor.from_pretrained(
            folder, **_OFFLINE, backend="pil", **spec.pictures
        )
    if odd := [name for name in spec.pictures if not hasattr(processor, name)]:
        raise ModelError(
            f"{type(processor).__name__} has no setting {', '.join(odd)}: look at llm.pictures."
        )
    return config, processor


def _pad_token(tokenizer: Any, rows: int) -> str:
    """An existing token to pad with, whose id has one of the ``rows`` of the embedding."""
    known = tokenizer.get_vocab()
    spare = [token for token in _SPARE_PADS if token in known]
    for token in (tokenizer.pad_token, *spare, tokenizer.unk_token, tokenizer.eos_token):
        if token is not None and known.get(token, rows) < rows:
            return str(token)
    raise ModelError("the tokenizer has neither a pad, nor an unk, nor an eos token to pad with.")


def load_causal_lm(
    spec: BackboneSpec,
    device: torch.device | str,
    quantization_config: Any = None,
    prompts: Callable[[], Sequence[str]] = tuple,
) -> Any:
    """The language model, frozen, in eval mode, without dropout, and without a cache unless asked for.

    Weights stream from the files straight onto ``device``, each quantized as it arrives. The random stream
    is left as it was.

    Args:
        spec: which model.
        device: where it is to be; in a LightningModule ``self.trainer.strategy.root_device``.
        quantization_config: ``precision.QLoRAPrecision.quantization_config()`` where the spec quantizes. A
            model whose own files are quantized needs none, and keeps its own.
        prompts: of ``spec.rounding=gptq``, see ``rounding.Rounded``.

    Raises:
        DataSourceError, ModelError: files or a package cannot be had or loaded, the files lack weights, or a
            CPU cannot unpack them from blocks of this size.
        ValueError: ``spec.quantization`` and ``quantization_config`` do not go together.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    device = torch.device(device)
    dtype = resolve_dtype(spec, device)
    folder = rounded_folder(spec, prompts) or model_folder(spec.source, spec.revision, convert_gguf)
    with _loading(folder):
        config = _config(folder)
    _without_dropout(config)
    options = _quantizing(spec, config, quantization_config)
    loader: Any = AutoModelForCausalLM  # whose annotation forgets the loading info
    if isinstance(spec, VisionSpec):
        loader = AutoModelForImageTextToText
        if given := options.get("quantization_config"):
            options["quantization_config"] = sparing(given, unquantized_paths(loader, config))
    with _loading(folder, device):
        model, info = loader.from_pretrained(
            folder, **_OFFLINE, **options, config=config, use_safetensors=True, dtype=dtype,
            device_map={"": device}, output_loading_info=True,
            attn_implementation=implementation(spec.attention, device, dtype),
        )  # fmt: skip
    _require_weights(folder, info["missing_keys"])
    if isinstance(spec, VisionSpec) and spec.projector:
        take_projector(model, Path(spec.projector).expanduser())
    model.config.use_cache = False
    # What PEFT writes into an adapter's files: a name that means something on other machines.
    model.name_or_path = spec.source if isinstance(spec.source, str) else spec.source.name
    mind_cpu_kernels(model, device)
    return model.eval().requires_grad_(False)


def _without_dropout(config: Any) -> None:
    """Pre-training's dropout (OPT's 0.1, its dropped layers) is no part of tuning with an adapter."""
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        rate = isinstance(value, float) and re.search("dropout|pdrop|layerdrop", name)
        if rate and name != "classifier_dropout":
            setattr(text, name, 0.0)


def recompute_activations(model: Any) -> None:
    """Compute the activations inside layers again in the backward pass instead of keeping them."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in decoder_layers(model):
        # transformers recomputes layers in training mode only; ours are frozen, and have no dropout.
        layer.training = True


def decoder_layers(model: Any) -> list[Any]:
    """The layers that a model of transformers is a stack of."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def _quantizing(spec: BackboneSpec, config: Any, given: Any) -> dict[str, Any]:
    """The argument that quantizes while loading, if any."""
    if getattr(config, "quantization_config", None) is not None:
        return {}
    if spec.quantization and given is None:
        raise ValueError(
            f"quantization is {spec.quantization}, but nothing quantizes: give the Trainer "
            "QLoRAPrecision.for_spec(spec) and load with its quantization_config(), or set quantization=null."
        )
    if given is not None and not spec.quantization:
        raise ValueError("a quantization_config was given, but the spec says quantization=null.")
    return {} if given is None else {"quantization_config": given}


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF model's tokenizer and weights as ``save_pretrained`` does, float32 safetensors.

    Raises:
        DataSourceError: the file cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {**_OFFLINE, "gguf_file": file.name}
    with _loading(file):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(file.parent, **source, dtype=torch.float32)
        # transformers refuses to save what it calls quantized, though all weights are float32 by now.
        for name in {"hf_quantizer", "is_quantized", "quantization_method"} & set(vars(model)):
            delattr(model, name)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        save_model(model, folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _loading(folder: Path, device: torch.device | None = None) -> Iterator[None]:
    """Without transformers' bars, with the random streams kept, and with one kind of error."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    cuda = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with the files
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        files = f"{folder} cannot be loaded ({first_line(error)}): {mending(folder)}."
        raise unusable(error) or DataSourceError(files) from error
    finally:
        if shown:
            logging.enable_progress_bar()


def _require_weights(folder: Path, missing: Any) -> None:
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise DataSourceError(f"{folder} lacks weights of its model: {names} ...")


def _require_room(folder: Path, length: int, tokenizer: Any, config: Any, what: str) -> None:
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    if length > (limit := min(n for n in limits if n)):
        raise DataSourceError(
            f"the {what} in {folder} reads at most {limit} tokens, but max_length is {length}."
        )


def _require_known_layers(folder: Path) -> None:
    """Refuse a sentence-transformers folder with a layer on top (a projection) that nobody would apply."""
    file = folder / "modules.json"
    if not file.is_file():
        return
    types = {m["type"].rpartition(".")[2] for m in json.loads(file.read_text(encoding="utf-8"))}
    if types - _LAYERS:
        raise DataSourceError(
            f"{folder} has the layers {', '.join(sorted(types - _LAYERS))}, which are not written here: "
            f"choose an encoder of {', '.join(sorted(_LAYERS))} alone."
        )
