"""What of vLLM's documented interface is used, computed by transformers: for machines without it.

The signatures are those of vLLM 0.10 to 0.23 (``vllm/entrypoints/llm.py``, ``sampling_params.py``,
``lora/request.py``, ``outputs.py``, ``engine/arg_utils.py``) as far as they are used: any other argument is
an error. As vLLM does, ``generate`` puts all of a picture's tokens in place of one, keeps the order of
prompts, and leaves the token that ends a text among ``token_ids``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    detokenize: bool = True
    repetition_penalty: float = 1.0


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class LLM:
    model: str
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    seed: int = 0
    gpu_memory_utilization: float = 0.9
    mm_processor_kwargs: dict[str, Any] | None = None
    pipeline_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    max_model_len: int | None = None
    limit_mm_per_prompt: dict[str, int] | None = None
    enable_lora: bool = False
    max_lora_rank: int = 16

    def __post_init__(self) -> None:
        from peft import PeftModel
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoTokenizer,
        )

        self._peft = PeftModel
        kwargs: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "local_files_only": True}
        config = json.loads((Path(self.model) / "config.json").read_text())
        loader: Any = (
            AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
        )
        self.inner = loader.from_pretrained(self.model, **kwargs).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.model, local_files_only=True)
        self.calls: list[int] = []
        self.expands_wrongly = False
        instances.append(self)

    def generate(
        self,
        prompts: Sequence[dict[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert isinstance(sampling_params, Sequence)
        assert len(sampling_params) == len(prompts)
        assert (lora_request is not None) == self.enable_lora
        if lora_request is not None and not isinstance(self.inner, self._peft):
            self.inner = self._peft.from_pretrained(self.inner, lora_request.lora_path).eval()
        self.calls.append(len(prompts))
        pairs = enumerate(zip(prompts, sampling_params, strict=True))
        return [self._one(str(i), prompt, how) for i, (prompt, how) in pairs]

    def _one(self, name: str, prompt: dict[str, Any], how: SamplingParams) -> RequestOutput:
        assert prompt.keys() <= {"prompt_token_ids", "multi_modal_data"}
        ids, given = list(prompt["prompt_token_ids"]), {}
        if pictures := prompt.get("multi_modal_data", {}).get("image", []):
            assert self.limit_mm_per_prompt is not None
            assert len(pictures) <= self.limit_mm_per_prompt["image"]
            ids, given = self._expanded(ids, pictures)
        assert how.temperature == 0 or how.seed is not None
        assert self.max_model_len is None or len(ids) + (how.max_tokens or 0) <= self.max_model_len
        with torch.no_grad():
            out = self.inner.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=how.max_tokens, eos_token_id=how.stop_token_ids, do_sample=False,
                pad_token_id=0, use_cache=True, **given,
            )  # fmt: skip
        made = out[0, len(ids) :].tolist()
        read = ids + [0] * self.expands_wrongly
        return RequestOutput(name, read, [CompletionOutput(0, "", tuple(made))])

    def _expanded(self, ids: list[int], pictures: list[Any]) -> tuple[list[int], dict[str, Any]]:
        """Each image token in turn becomes all tokens of its picture, as vLLM's prompt updates do."""
        from lightning_modules.llm.picture_processors import PictureProcessor

        processor = PictureProcessor(
            *_processor(Path(self.model), self.mm_processor_kwargs or {}), self.tokenizer
        )
        image = self.inner.config.image_token_id
        assert ids.count(image) == len(pictures), "one token a picture"
        made, tensors, queue = list[int](), list[dict[str, Any]](), list(pictures)
        for token in ids:
            if token != image:
                made.append(token)
                continue
            seen, text = processor.pixels(queue.pop(0))
            inner = text[len(processor.before) : len(text) - len(processor.behind)]
            made += self.tokenizer(inner, add_special_tokens=False)["input_ids"]
            tensors.append(seen)
        given = {name: torch.cat([one[name] for one in tensors]) for name in tensors[0]}
        if "image_grid_thw" in given:
            given["mm_token_type_ids"] = (torch.tensor([made]) == image).int()
        return made, given


instances: list[LLM] = []


def _processor(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoImageProcessor

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return config, AutoImageProcessor.from_pretrained(folder, backend="pil", **settings)


def modules() -> dict[str, Any]:
    """What ``import vllm`` finds, for ``sys.modules``."""
    request = SimpleNamespace(LoRARequest=LoRARequest)
    top = SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams)
    return {
        "vllm": top,
        "vllm.lora": SimpleNamespace(request=request),
        "vllm.lora.request": request,
    }


def install(folder: Path, version: str = "0.0.1") -> Path:
    """A folder for ``PYTHONPATH`` in which vLLM is installed, as far as a process can tell."""
    (folder / "vllm" / "lora").mkdir(parents=True)
    here = "from tests.lightning_modules.vllm_stand_in import"
    (folder / "vllm" / "__init__.py").write_text(f"{here} LLM, SamplingParams\n")
    (folder / "vllm" / "lora" / "__init__.py").write_text("")
    (folder / "vllm" / "lora" / "request.py").write_text(f"{here} LoRARequest\n")
    about = folder / f"vllm-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return folder
