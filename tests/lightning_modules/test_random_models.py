"""A model of random weights is the same one everywhere, and is loaded as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.build import build
from experiments.config import load
from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.specs import BackboneSpec


def test_the_config_makes_one_and_reads_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    spec = build(load("tallrec/movie_zero_shot", ["llm=tiny_random"]).config["llm"])
    cpu = torch.device("cpu")
    first, again = (load_causal_lm(spec, device=cpu) for _ in range(2))
    tokenizer = load_tokenizer(spec)
    ids = tokenizer("Wallace & Gromit: 日本", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "Wallace & Gromit: 日本"
    assert first.dtype == torch.float32
    with torch.no_grad():
        logits = first(ids).logits
        assert torch.equal(logits, again(ids).logits)
    assert logits.shape == (1, ids.shape[1], len(tokenizer))
    assert len(list((tmp_path / "models").glob("random-2x64-*"))) == 1


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert BackboneSpec(RandomModel(seed=1)).digest() != BackboneSpec(RandomModel()).digest()
    folders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        RandomModel(seed=seed, width=32, layers=1, longest=64).write(tmp_path / name)
        folders.append(load_file(tmp_path / name / "model.safetensors"))
    one, same, other = folders
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("bad", [{"width": 48}, {"width": 0}, {"layers": 0}, {"longest": 0}])
def test_impossible_sizes_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        RandomModel(**bad)
    with pytest.raises(ValueError, match="names its version"):
        BackboneSpec(RandomModel(), "0" * 40)
