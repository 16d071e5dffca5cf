"""Texts that vLLM writes, with a stand-in of its interface; and with the real one where it is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import polars
import pytest
import torch

from datamodules.types import ItemWords
from lightning_modules.errors import ModelError
from lightning_modules.item_pictures import ItemPicturesModule
from lightning_modules.item_summaries import ItemSummariesModule
from lightning_modules.llm.adapters import attach_adapter, save_adapter
from lightning_modules.llm.backbones import load_causal_lm
from lightning_modules.llm.engines import TransformersEngine, VLLMEngine
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.random_vision import RandomVisionModel
from lightning_modules.llm.sampling import Sampling
from lightning_modules.llm.specs import SMOLVISION, AdapterSpec, BackboneSpec, VisionSpec
from tests.lightning_modules import vllm_stand_in
from tests.lightning_modules.test_item_pictures import Pictures

WORDS = ItemWords("toy", "toys", "buy", "bought")
SPEC = BackboneSpec(RandomModel(), dtype="float32", max_length=512)
REAL = importlib.util.find_spec("vllm") is not None


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, data_cache: Path) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(data_cache))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """vLLM is installed, and what was made of it."""
    monkeypatch.syspath_prepend(str(vllm_stand_in.install(tmp_path / "site")))
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_stand_in, "instances", made := [])
    return made


def trained_by(module: Any, devices: int = 1) -> Any:
    """The module with its language model loaded, by whatever engine."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(
        world_size=devices,
        strategy=strategy,
        precision_plugin=None,
        datamodule=SimpleNamespace(seed=0),
    )
    module.configure_model()
    return module


def summaries(engine: Any, spec: BackboneSpec = SPEC, count: int = 5) -> Any:
    frame = polars.DataFrame(
        {"title": [f"Toy {i}" for i in range(count)], "description": ["red and round " * 9] * count}
    )
    made = ItemSummariesModule(frame, WORDS, spec, max_new_tokens=8, engine=engine)
    return trained_by(made)


def described(engine: Any, architecture: Any, **sizes: int) -> Any:
    spec = VisionSpec(RandomVisionModel(architecture, **sizes), dtype="float32", max_length=1024)
    made = ItemPicturesModule(WORDS, Pictures(1, None, 3, 4), spec, max_new_tokens=6, engine=engine)
    return trained_by(made)


def test_the_same_prompts_are_answered_alike(stand_in: list[Any]) -> None:
    here, there = summaries(TransformersEngine()), summaries(VLLMEngine())
    there.predict_step(torch.arange(5))
    assert there.model is None  # nothing was loaded here
    assert stand_in[0].calls == [5]  # one batch
    assert there.table().equals(here.table())
    assert stand_in[0].calls == [5]
    # None of the texts is another engine's.
    assert not set(there.generations.known) & set(here.generations.known)
    assert there.writer != here.writer


@pytest.mark.parametrize("architecture", ["llava_lite", "llava_next", "idefics3", "qwen2_5_vl"])
def test_pictures_are_given_as_they_are_behind_one_token_each(
    architecture: Any, stand_in: list[Any]
) -> None:
    here, there = described(None, architecture), described(VLLMEngine(), architecture)
    assert here.engine == TransformersEngine()
    assert there.table().equals(here.table())
    assert stand_in[0].limit_mm_per_prompt == {"image": 1}
    assert there.table()["text"].null_count() >= 1


def test_a_prompt_that_vllm_reads_otherwise_writes_nothing(stand_in: list[Any]) -> None:
    there = described(VLLMEngine(), "llava_lite")
    stand_in[0].expands_wrongly = True
    with pytest.raises(ModelError, match="take engine=transformers"):
        there.table()
    assert not there.generations.known


def test_settings_reach_vllm(stand_in: list[Any]) -> None:
    engine = VLLMEngine(4, 2, "ray", gpu_memory_utilization=0.5)
    made = summaries(engine)
    (llm,) = stand_in
    assert (llm.tensor_parallel_size, llm.pipeline_parallel_size) == (4, 2)
    assert (llm.distributed_executor_backend, llm.gpu_memory_utilization) == ("ray", 0.5)
    assert (llm.max_model_len, llm.dtype, llm.trust_remote_code) == (512, "float32", False)
    # How a model is spread is no part of what it writes.
    assert made.writer == summaries(VLLMEngine()).writer


def test_drawn_texts_have_streams_of_their_own(stand_in: list[Any]) -> None:
    served = summaries(VLLMEngine()).served
    greedy = served._params(7, None, "ab")
    assert (greedy.temperature, greedy.seed, greedy.max_tokens) == (0.0, None, 7)
    assert greedy.stop_token_ids
    assert greedy.repetition_penalty == 1.0
    drawn = served._params(7, Sampling(0.5, 0.8), "0f" * 16)
    assert (drawn.temperature, drawn.top_p, drawn.seed) == (0.5, 0.8, int("0f" * 7 + "0", 16))


def test_an_adapter_is_part_of_the_key_and_of_the_answer(
    stand_in: list[Any], tmp_path: Path
) -> None:
    model = attach_adapter(load_causal_lm(SPEC, "cpu"), AdapterSpec(rank=4, alpha=64), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    save_adapter(model, tmp_path / "adapter")
    plain, tuned = summaries(VLLMEngine()), summaries(VLLMEngine(adapter=str(tmp_path / "adapter")))
    assert stand_in[1].max_lora_rank == 8  # the least that vLLM has room for
    assert plain.writer != tuned.writer
    assert not tuned.table().equals(plain.table())


def test_what_vllm_cannot_run_is_refused_before_it_is_loaded(
    stand_in: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="projector of our own: take engine=transformers"):
        VLLMEngine().require(VisionSpec(SMOLVISION, projector=str(tmp_path / "best.ckpt")))
    with pytest.raises(ValueError, match=r"llm\.quantization=nf4 is made here"):
        VLLMEngine().require(BackboneSpec(RandomModel(), quantization="nf4"))
    with pytest.raises(ValueError, match="no folder of a LoRA adapter"):
        VLLMEngine(adapter=str(tmp_path))
    with pytest.raises(ValueError, match="expected mp, ray or null"):
        VLLMEngine(distributed_executor_backend="slurm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        VLLMEngine(tensor_parallel_size=0)
    with pytest.raises(ModelError, match=r"launch\.devices=1"):
        trained_by(summaries(None).__class__(
            polars.DataFrame({"title": ["x"], "description": ["y"]}), WORDS, SPEC, engine=VLLMEngine()
        ), devices=2)  # fmt: skip
    assert stand_in == []


def test_without_vllm_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("lightning_modules.llm.engines.version", missing)
    with pytest.raises(
        ValueError, match="not installed: run pip install 'llmrec-lightning\\[vllm\\]'"
    ):
        VLLMEngine().require(SPEC)


@pytest.mark.gpu
@pytest.mark.skipif(
    not REAL or not torch.cuda.is_available(), reason="needs vLLM and a CUDA device"
)
@pytest.mark.parametrize("architecture", [None, "qwen2_5_vl", "llava_next"])
def test_vllm_itself_writes_what_transformers_writes(architecture: Any) -> None:
    """Rounding may decide between near tokens: the first letters of most texts must be the same."""
    pl.seed_everything(0, verbose=False)
    engine = VLLMEngine(gpu_memory_utilization=0.3)
    if architecture is None:
        spec = BackboneSpec(RandomModel(width=256), dtype="float32", max_length=512)
        here, there = summaries(None, spec, count=8), summaries(engine, spec, count=8)
    else:
        here, there = (described(one, architecture, width=256) for one in (None, engine))
    pairs = zip(here.table()["text"], there.table()["text"], strict=True)
    same = [(a or "")[:4] == (b or "")[:4] for a, b in pairs]
    assert sum(same) / len(same) > 0.5
