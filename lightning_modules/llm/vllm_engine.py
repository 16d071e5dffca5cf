"""A model that vLLM runs: prompts as token ids, pictures beside them, tokens back.

vLLM puts a picture's tokens into a prompt itself, so that it is given prompts with one token a picture; what
it makes of them must be what is read here, or nothing is written. It cuts pictures down with torchvision, we
with Pillow: pixels differ by rounding.

Written against the documented interface of vLLM 0.10 to 0.23 (``LLM``, ``SamplingParams``, ``LoRARequest``,
``RequestOutput``), and tested with a stand-in of it: real vLLM, more than one GPU and Ray were not run where
this was written. ``python -m pytest -m gpu`` runs the real one where it is installed.

Legend: B rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_modules.errors import ModelError
from lightning_modules.llm.backbones import convert_gguf
from lightning_modules.llm.generation import until
from lightning_modules.llm.model_files import model_folder
from lightning_modules.llm.sampling import Sampling
from lightning_modules.llm.specs import BackboneSpec, VisionSpec

if TYPE_CHECKING:
    from PIL.Image import Image

    from lightning_modules.llm.engines import VLLMEngine

Row = tuple[Sequence[int], Sequence[int], Sequence["Image"]]


class Served:
    """One model on the GPUs that ``engine`` names.

    Args:
        engine: how it is spread.
        llm: which model.
        dtype: that it computes in.
        tokenizer: its tokenizer; tells what ends a text.
        pictures: that a prompt shows, at most.
    """

    def __init__(
        self,
        engine: VLLMEngine,
        llm: BackboneSpec,
        dtype: torch.dtype,
        tokenizer: Any,
        pictures: int,
    ) -> None:
        from vllm import LLM

        folder = model_folder(llm.source, llm.revision, convert_gguf)
        self.ends = ends_of(folder, tokenizer)
        options: dict[str, Any] = {}
        if isinstance(llm, VisionSpec):
            options["limit_mm_per_prompt"] = {"image": pictures}
            if llm.pictures:
                options["mm_processor_kwargs"] = dict(llm.pictures)
        self.adapter = None
        if engine.adapter is not None:
            from vllm.lora.request import LoRARequest

            options |= {"enable_lora": True, "max_lora_rank": engine.adapter_rank}
            path = str(Path(engine.adapter).expanduser().absolute())
            self.adapter = LoRARequest("adapter", 1, path)
        self.model = LLM(
            model=str(folder),
            trust_remote_code=False,
            dtype=str(dtype).removeprefix("torch."),
            seed=0,
            max_model_len=llm.max_length,
            tensor_parallel_size=engine.tensor_parallel_size,
            pipeline_parallel_size=engine.pipeline_parallel_size,
            distributed_executor_backend=engine.distributed_executor_backend,
            gpu_memory_utilization=engine.gpu_memory_utilization,
            **options,
        )

    def write(
        self, rows: Sequence[Row], most: int, sampling: Sampling | None, streams: Sequence[str]
    ) -> list[list[int]]:
        """New tokens of each row (B,), up to the end of its text.

        Args:
            rows: each prompt's tokens, the same with one token a picture, and its pictures.
            most: tokens of a text, at most.
            sampling: how tokens are drawn; None takes the likeliest.
            streams: (B,) hexadecimal; a row draws from a stream of its own, whatever rows stand beside it.

        Raises:
            ModelError: vLLM reads a picture as other tokens.
        """
        asked: list[Any] = []
        for _, short, pictures in rows:
            asked.append({"prompt_token_ids": list(short)})
            if pictures:
                asked[-1]["multi_modal_data"] = {"image": list(pictures)}
        how = [self._params(most, sampling, stream) for stream in streams]
        found = self.model.generate(asked, how, use_tqdm=False, lora_request=self.adapter)
        for (ids, _, _), made in zip(rows, found, strict=True):
            if list(made.prompt_token_ids) != list(ids):
                raise ModelError(
                    f"vLLM read a prompt as {len(made.prompt_token_ids)} tokens that is {len(ids)} here: it "
                    "treats this model's pictures in another way, so take engine=transformers"
                )
        return [until(list(made.outputs[0].token_ids), self.ends) for made in found]

    def _params(self, most: int, sampling: Sampling | None, stream: str) -> Any:
        from vllm import SamplingParams

        drawn: dict[str, Any] = {"temperature": 0.0}
        if sampling is not None:
            drawn = {
                "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": int(stream[:15], 16),
            }  # fmt: skip
        # Tokens are turned into texts here, and a penalty that a model's files ask for is not taken.
        return SamplingParams(
            max_tokens=most,
            stop_token_ids=self.ends,
            detokenize=False,
            repetition_penalty=1.0,
            **drawn,
        )


def ends_of(folder: Path, tokenizer: Any) -> list[int]:
    """As ``generation.ends_of``, of a model that is not loaded here."""
    found: Any = None
    for name in ("config.json", "generation_config.json"):  # the second one's word counts
        if (file := folder / name).is_file():
            told = json.loads(file.read_text(encoding="utf-8"))
            text = told.get("text_config") or {}
            found = told.get("eos_token_id", text.get("eos_token_id", found))
    more = found if isinstance(found, list) else [] if found is None else [found]
    return [*dict.fromkeys([tokenizer.eos_token_id, *more])]
