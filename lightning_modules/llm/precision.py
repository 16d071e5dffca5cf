"""Training on quantized weights: what a model is loaded with, what is checked, and how it is computed.

The only place with bitsandbytes. Weights of linear layers are kept in 4 or 8 bits and frozen; gradients pass
through them into adapters and projectors, which stay float32 (QLoRA: Dettmers et al., NeurIPS 2023,
arXiv 2305.14314). Lightning's own BitsandbytesPrecision is of no use here: it refuses CPUs, and quantizes
every linear layer of the module, LoRA's A and B and the tied output head included.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.errors import ModelError
from lightning_modules.llm.backbones import resolve_dtype
from lightning_modules.llm.specs import BLOCK_SIZES, BackboneSpec, DType, Quantization

_SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


class QLoRAPrecision(Precision):
    """Keeps linear layers quantized, computes them in ``compute_dtype``, and trains in float32.

    In ``configure_model``, where each rank knows its device::

        plugin = self.trainer.precision_plugin
        device = self.trainer.strategy.root_device
        self.llm = load_causal_lm(spec, device, plugin.quantization_config(device))
        self.llm = attach_adapter(self.llm, adapter, seed)

    Args:
        mode: ``nf4`` (4-bit NormalFloat), ``nf4-dq`` (its scales quantized, too), ``fp4`` or ``int8``.
        compute_dtype: of the products of quantized weights; ``auto`` as in ``BackboneSpec.dtype``.
        block_size: weights in 4 bits that share a scale.

    Raises:
        ValueError: no such mode, type or block.
    """

    precision: Any = "qlora"  # what Lightning's tables call it

    def __init__(
        self, mode: Quantization = "nf4", compute_dtype: DType = "auto", block_size: int = 64
    ) -> None:
        super().__init__()
        if mode not in get_args(Quantization):
            raise ValueError(f"mode must be {' or '.join(get_args(Quantization))}, got {mode!r}")
        self.mode = mode
        if compute_dtype not in get_args(DType):
            raise ValueError(
                f"compute_dtype must be {' or '.join(get_args(DType))}, got {compute_dtype!r}"
            )
        if block_size not in BLOCK_SIZES:
            raise ValueError(
                f"block_size must be {' or '.join(map(str, BLOCK_SIZES))}, got {block_size!r}"
            )
        self.dtype_name, self.block_size = compute_dtype, block_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def for_spec(cls, spec: BackboneSpec) -> QLoRAPrecision:
        """The plugin that a model of this description is trained with.

        Raises:
            ValueError: the description quantizes nothing.
        """
        if spec.quantization is None:
            raise ValueError(
                "the spec says quantization=null: QLoRAPrecision is for quantized models."
            )
        return cls(spec.quantization, spec.dtype, spec.block_size)

    def compute_dtype(self, device: torch.device | str | None = None) -> torch.dtype:
        """The type of the arithmetic on ``device``. Raises ValueError for float16 on a CPU."""
        return resolve_dtype(self.dtype_name, self.device if device is None else device)

    def quantization_config(self, device: torch.device | str | None = None) -> Any:
        """What ``load_causal_lm`` quantizes with; the output head and the embeddings are left as they are.

        Args:
            device: where the model is to be; None is the first GPU, or the CPU where there is none.
        """
        from transformers import BitsAndBytesConfig

        if self.mode == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        config: Any = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.mode.removesuffix("-dq"),
            bnb_4bit_use_double_quant=self.mode.endswith("-dq"),
            bnb_4bit_compute_dtype=self.compute_dtype(device),
        )
        if self.block_size != 64:
            config.quant_method, config.block_size = _blocks_of_any_size(), self.block_size
        return config

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Check what ``configure_model`` built, and set how it is computed; converts nothing.

        Raises:
            ModelError: see ``problems``; all of them are named.
        """
        trainer = _trainer(module)
        if trainer is not None:
            refuse_sharding(trainer.strategy)
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        layers = dict(quantized_layers(module))
        if layers:
            self.device = next(iter(layers.values())).weight.device
        dtype = self.compute_dtype(self.device)
        if found := list(problems(module, layers, fitting, dtype)):
            raise ModelError(f"QLoRAPrecision: {'; '.join(found)}")
        for layer in layers.values():
            layer.support_avx512bf16_for_cpu = False  # see cpu_kernels
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
        _keep_in_float32(module)
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_not_of_a_cast)
        return module

    def forward_context(self) -> AbstractContextManager:
        """Products in the compute type; what is float32 stays so outside of them."""
        dtype = self.compute_dtype(self.device)
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)


@cache
def _blocks_of_any_size() -> str:
    """What transformers calls 4 bits in blocks that a config gives the size of; its own are always of 64."""
    from transformers.quantizers import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    name = "bitsandbytes_4bit_blocks"

    @register_quantizer(name)
    class Blocks(Bnb4BitHfQuantizer):  # type: ignore[misc, unused-ignore]
        """Says the size before weights are read; each is then quantized with what its empty layer says."""

        def _process_model_before_weight_loading(  # type: ignore[override]
            self, model: Any, device_map: Any, **options: Any
        ) -> None:
            super()._process_model_before_weight_loading(model, device_map, **options)
            for _, layer in quantized_layers(model):
                layer.weight.blocksize = self.quantization_config.block_size  # type: ignore[attr-defined]

    return name


def grid_of(quantization: str) -> Tensor:
    """(G,) ascending values between -1 and 1 that weights of ``nf4`` or ``fp4`` have, before their scale."""
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type(quantization, device="cpu")
    return values.double().unique()


def _not_of_a_cast(record: logging.LogRecord) -> bool:
    """int8 layers cast their inputs to float16 and say so at every call."""
    return "inputs will be cast" not in record.getMessage()


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of every linear layer that bitsandbytes keeps in 4 or 8 bits."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, layer in module.named_modules():
        if isinstance(layer, (Linear4bit, Linear8bitLt)):
            yield name, layer


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's own weight, of whatever kind of layer, is one of bitsandbytes'."""
    from bitsandbytes.nn import Int8Params, Params4bit

    return isinstance(getattr(layer, "weight", None), (Params4bit, Int8Params))


def problems(
    module: nn.Module, layers: dict[str, Any], fitting: bool, dtype: torch.dtype
) -> Iterator[str]:
    """What keeps a module from being trained, or evaluated, on quantized weights.

    Args:
        module: the LightningModule, its model loaded.
        layers: its quantized layers by name.
        fitting: whether it is about to be trained.
        dtype: of the arithmetic.
    """
    if not layers:
        yield (
            "no layer is quantized: load the model in configure_model with "
            "load_causal_lm(spec, device, self.trainer.precision_plugin.quantization_config(device))"
        )
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    kept = {f"{name}.weight" for name in layers}
    if bad := [n for n, p in trained.items() if n in kept or not p.is_floating_point()]:
        yield f"{bad[0]} is to be trained, but it is quantized: freeze it and train an adapter"
    if bad := [name for name in layers if "lora_" in name]:
        yield f"{bad[0]} belongs to an adapter, but it is quantized: attach adapters after loading"
    ends = {id(end) for model in module.modules() for end in _ends(model)}
    names = (n for n, layer in module.named_modules() if id(layer) in ends and is_quantized(layer))
    if name := next(names, None):
        yield f"{name} is an embedding or output head, but it is quantized: load it unquantized"
    if fitting and not trained:
        yield "nothing is left to train: attach an adapter or add a trainable layer"
    if fitting and dtype == torch.float16:
        yield "float16 needs its losses scaled in training: take compute_dtype bfloat16 or float32"
    half = (torch.bfloat16, torch.float16)
    rest = (n for n, p in module.named_parameters() if p.dtype in half and n not in kept)
    if dtype == torch.float32 and (first := next(rest, None)):
        yield f"compute_dtype is float32, but {first} is not: load the model with dtype=float32, too"


def _ends(model: nn.Module) -> Iterator[nn.Module]:
    """A language model's embedding and output head."""
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # A PEFT wrapper and a vision tower have such methods that may lead nowhere.
        try:
            found = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(found, nn.Module):
            yield found


def _keep_in_float32(module: nn.Module) -> None:
    """Norms and trainable weights; not embeddings and the output head, which are large (as PEFT would)."""
    for layer in module.modules():
        if "norm" in type(layer).__name__.lower() and not any(True for _ in layer.children()):
            layer.float()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def refuse_sharding(strategy: object) -> None:
    """Raise ModelError for a strategy, or the name of one, that splits weights over devices."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, _SHARDING) or name.startswith(("fsdp", "deepspeed")):
        raise ModelError(
            f"{name} shards weights, which bitsandbytes' layers cannot be: take strategy ddp (each device "
            "holds one quantized copy) or set quantization=null."
        )


def _trainer(module: nn.Module) -> Any:
    """The trainer that a module is attached to, if any."""
    if not isinstance(module, pl.LightningModule):
        return None
    try:
        return module.trainer
    except RuntimeError:
        return None


def paged_adamw_8bit(
    params: Iterable[Tensor],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """AdamW whose state is kept in 8 bits and may be paged out to host memory (QLoRA, arXiv 2305.14314).

    bitsandbytes keeps the state of tensors below 4,096 elements in float32, pages that of tensors of 100,000
    and more, and after a resume keeps it all on the device.

    Args:
        params: trainable parameters.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.

    Raises:
        ValueError: ``params`` is empty, or not all of it is on CUDA devices.
    """
    chosen = list(params)
    if not chosen:
        raise ValueError("paged_adamw_8bit was given no parameter to train.")
    if any(p.device.type != "cuda" for p in chosen):
        raise ValueError("paged_adamw_8bit is for CUDA devices: take AdamW on others.")
    from bitsandbytes.optim import PagedAdamW8bit

    optimizer: Optimizer = PagedAdamW8bit(
        chosen, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )
    return optimizer
