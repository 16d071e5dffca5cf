"""What the weights of a model take, quantized or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_modules.llm.precision import quantized_layers


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that a model's weights take; activations, gradients and optimizer state are not counted."""

    parameters: int  # as if nothing were quantized
    quantized_parameters: int
    quantized: int  # their packed weights and scales
    other: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.quantized + self.other

    @property
    def per_parameter(self) -> float:
        """Mean bytes of a parameter."""
        return self.total / max(self.parameters, 1)

    def dense(self, dtype: Literal["float32", "bfloat16"]) -> int:
        """What the same parameters would take unquantized."""
        return self.parameters * {"float32": 4, "bfloat16": 2}[dtype]

    @property
    def told(self) -> str:
        """In words, for the terminal."""
        sizes = [self.total, self.dense("bfloat16"), self.dense("float32")]
        kept, half, full = (f"{size / 2**20:.0f} MiB" for size in sizes)
        return (
            f"its weights take {kept} ({self.per_parameter:.2f} bytes each), in bfloat16 they would take "
            f"{half}, in float32 {full}"
        )


def memory_report(model: nn.Module) -> MemoryReport:
    """Count what the weights of ``model`` take; tied weights and shared code tables count once."""
    packed, tensors, logical = set(), {}, 0
    for _, layer in quantized_layers(model):
        packed.add(id(layer.weight))
        logical += layer.in_features * layer.out_features
        tensors.update({t.data_ptr(): t.nbytes for t in _stored(layer)})
    rest = [p for p in model.parameters() if id(p) not in packed]
    return MemoryReport(
        parameters=logical + sum(p.numel() for p in rest),
        quantized_parameters=logical,
        quantized=sum(tensors.values()),
        other=sum(p.nbytes for p in rest),
    )


def _stored(layer: Any) -> Iterator[Tensor]:
    """The packed weight of a quantized layer and all that is needed to unpack it."""
    yield layer.weight.data
    state = getattr(layer.weight, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor))
        state = state.state2 if state.nested else None
    for holder in (layer.weight, getattr(layer, "state", None)):
        if isinstance(scale := getattr(holder, "SCB", None), Tensor):
            yield scale
