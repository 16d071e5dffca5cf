"""What runs a language model that writes texts: transformers, or vLLM's offline batches on GPUs.

Both are given the same prompts. A text's key holds the engine and its version: two engines round, and cut
pictures down, each in their own way.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.sources import file_digest
from lightning_modules.llm.assembled import Assembled
from lightning_modules.llm.specs import BackboneSpec, VisionSpec

VERSION = 2  # of how tokens are chosen here: raise it when the same prompt is answered otherwise
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


@dataclass(frozen=True)
class TransformersEngine:
    """``generate`` of transformers, in the process of the stage: on CPUs and GPUs."""

    def named(self) -> str:
        """What of it texts depend on."""
        return f"transformers {version('transformers')} {VERSION}"

    def require(self, llm: BackboneSpec) -> None:
        """Every model is one that it runs."""


@dataclass(frozen=True)
class VLLMEngine:
    """vLLM's offline batch interface (the extra ``vllm``), which spreads a model over GPUs and nodes itself.

    The stage is one process: ``launch.devices=1``. How a model is spread is no part of a text's key.

    Args:
        tensor_parallel_size: GPUs that each layer is split over; of one node.
        pipeline_parallel_size: groups of layers, a node each.
        distributed_executor_backend: ``mp`` within a node, ``ray`` across nodes (start Ray on them first);
            None leaves it to vLLM.
        gpu_memory_utilization: the share of a GPU's memory that it may take.
        adapter: a folder with a LoRA adapter in PEFT's format, of the model that writes.

    Raises:
        ValueError: a setting is impossible, or ``adapter`` holds no such adapter.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    gpu_memory_utilization: float = 0.9
    adapter: str | None = None

    def __post_init__(self) -> None:
        sizes = (self.tensor_parallel_size, self.pipeline_parallel_size)
        if min(sizes) < 1 or not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"engine got tensor_parallel_size={sizes[0]}, pipeline_parallel_size={sizes[1]}, "
                f"gpu_memory_utilization={self.gpu_memory_utilization}: expected at least 1, at least 1, and "
                "a share above 0 of at most 1"
            )
        if self.distributed_executor_backend not in (None, "mp", "ray"):
            raise ValueError(
                f"engine.distributed_executor_backend is {self.distributed_executor_backend!r}, expected mp, "
                "ray or null"
            )
        if self.adapter is not None and "r" not in self._adapter_settings():
            raise ValueError(
                f"engine.adapter={self.adapter} is no folder of a LoRA adapter in PEFT's format (with "
                "adapter_config.json and adapter_model.safetensors)"
            )

    @staticmethod
    def missing() -> str | None:
        """What has to be installed; None where nothing has."""
        try:
            version("vllm")
        except PackageNotFoundError:
            return (
                "engine=vllm needs vLLM, which is not installed: run pip install 'llmrec-lightning[vllm]' in "
                "an environment for a CUDA machine, or take engine=transformers"
            )
        return None

    def require(self, llm: BackboneSpec) -> None:
        """Refuse what vLLM cannot run.

        Raises:
            ValueError: it is not installed, or the model is put together here, or quantized here.
        """
        if isinstance(llm.source, Assembled) or (isinstance(llm, VisionSpec) and llm.projector):
            raise ValueError(
                "engine=vllm runs models as they were published, and this one is put together here with a "
                "projector of our own: take engine=transformers, or another llm"
            )
        if llm.quantization:
            raise ValueError(
                f"engine=vllm runs models in bfloat16 or float32, and llm.quantization={llm.quantization} is "
                "made here as a model is loaded: take the llm without it, or engine=transformers"
            )
        if lacks := self.missing():
            raise ValueError(lacks)

    def named(self) -> str:
        """What of it texts depend on."""
        named = f"vllm {version('vllm')} {VERSION}"
        if self.adapter is None:
            return named
        digests = [file_digest(file) for file in self._adapter_files()]
        return f"{named} {hashlib.sha256(json.dumps(digests).encode()).hexdigest()}"

    def load(self, llm: BackboneSpec, dtype: torch.dtype, tokenizer: Any, pictures: int) -> Any:
        """The running model, a ``vllm_engine.Served``.

        Args:
            llm: which model.
            dtype: that it computes in.
            tokenizer: its tokenizer.
            pictures: that a prompt shows, at most.
        """
        from lightning_modules.llm.vllm_engine import Served

        return Served(self, llm, dtype, tokenizer, pictures)

    # The adapter ---------------------------------------------------------------------------------------

    @property
    def adapter_rank(self) -> int:
        """The least rank with room for the adapter's."""
        rank = int(self._adapter_settings()["r"])
        fitting = [room for room in _RANKS if room >= rank]
        if not fitting:
            raise ValueError(f"engine.adapter has rank {rank}, and vLLM runs up to {_RANKS[-1]}")
        return fitting[0]

    def _adapter_files(self) -> list[Path]:
        folder = Path(str(self.adapter)).expanduser()
        return [folder / "adapter_config.json", folder / "adapter_model.safetensors"]

    def _adapter_settings(self) -> dict[str, Any]:
        files = self._adapter_files()
        if not all(file.is_file() for file in files):
            return {}
        found: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
        return found


Engine = TransformersEngine | VLLMEngine
