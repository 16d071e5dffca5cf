"""Reload equality: every way in which a reloaded language model can be another one than was saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.errors import ModelError
from lightning_modules.llm.instruction_tuning import InstructionModule
from lightning_modules.llm.reloading import WRITTEN, probe
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from tests.lightning_modules.tiny_llm import LONGEST, TINY, write_tiny_llm

LORA = AdapterSpec(rank=4, dropout=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llm(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A module as a trainer would have it, with weights of a file if there is one."""

    def build(
        weights: Path | None = None, adapter: AdapterSpec = LORA, source: Path = folder,
        dtype: Any = "float32", quantization: Any = None, start: Path | None = None,
        rounding: Any = "nearest",
    ) -> Any:  # fmt: skip
        spec = BackboneSpec(
            str(source), dtype=dtype, quantization=quantization, chat_template=False,
            max_length=LONGEST, rounding=rounding,
        )  # fmt: skip
        module = InstructionModule(spec, adapter, start=str(start) if start else None)
        plugin = module.precision_plugin("cpu", "auto")
        trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cpu")), precision_plugin=plugin,
            datamodule=SimpleNamespace(seed=0), global_step=3, num_test_batches=[1],
        )  # fmt: skip
        monkeypatch.setattr(InstructionModule, "trainer", trainer)
        if weights is not None:
            module.load_weights(weights)
        module.configure_model()
        return module

    return build


def moved(module: Any) -> Any:
    """As a fit leaves it: all that is trained is elsewhere, and in training mode."""
    draw = torch.Generator().manual_seed(1)
    for weight in (p for p in module.parameters() if p.requires_grad):
        weight.data += 0.05 * torch.randn(weight.shape, generator=draw)
    return module.train()


def saved(module: Any, path: Path) -> Path:
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("gemma", {"dtype": "bfloat16"}), ("llama", {"quantization": "nf4"}),
     ("llama", {"adapter": AdapterSpec("prefix", num_virtual_tokens=3)}),
     ("gemma", {"adapter": AdapterSpec("prompt", num_virtual_tokens=3)}),
     ("opt", {"adapter": AdapterSpec("full")}), ("opt", {"adapter": AdapterSpec("none")})],
)  # fmt: skip
def test_what_was_saved_is_found_again(
    made: Callable[..., Any], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    source = TINY[kind](tmp_path / kind)
    path = saved(moved(made(source=source, **options)), tmp_path / "best.ckpt")
    told = torch.load(path, weights_only=True)[WRITTEN]
    assert torch.isfinite(told["answers"]).all()
    assert told["answers"].std() > 0
    for use in ("on_test_start", "on_predict_start"):
        module = made(path, source=source, **options)
        assert module._reloaded is not None
        getattr(module, use)()
        assert module._reloaded is None  # looked at, once
    found = probe(module.model, module.tokenizer)
    if options.get("dtype") != "bfloat16":  # whose products are the trainer's to make
        torch.testing.assert_close(found, told["answers"], atol=1e-5, rtol=1e-5)


def test_a_file_whose_weights_are_others_is_refused(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    """torch writes it whole, so that no check sum of the file itself tells."""
    path = saved(moved(made()), tmp_path / "best.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    name = next(n for n in checkpoint["state_dict"] if "lora_B" in n)
    checkpoint["state_dict"][name][0, 0] += 1e-6
    torch.save(checkpoint, path)
    for place in ({"weights": path}, {"start": path}):
        with pytest.raises(
            ModelError, match=rf"best\.ckpt is damaged: its {name} is not what the fit"
        ):
            made(**place)


def test_weights_that_move_between_reading_and_testing_are_refused(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    path = saved(moved(made()), tmp_path / "best.ckpt")
    for use in ("on_test_start", "on_predict_start"):
        module = made(path)
        name, weight = next((n, p) for n, p in module.named_parameters() if p.requires_grad)
        weight.data[0] += 1e-3
        with pytest.raises(ModelError, match=rf"{name} is not what .*best\.ckpt holds \(nor are 0"):
            getattr(module, use)()


def test_what_is_exported_is_looked_at_too(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export reads the weights itself; here they are moved behind it."""
    module = made(saved(moved(made()), tmp_path / "best.ckpt"))
    take = module.take_weights
    monkeypatch.setattr(module, "take_weights", lambda: (take(), moved(module)))
    with pytest.raises(ModelError, match=r"best\.ckpt holds"):
        module.export(tmp_path / "export", torch.device("cpu"))
    assert not (tmp_path / "export").exists()


def test_what_is_trained_must_be_the_same(made: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(moved(made()), tmp_path / "best.ckpt")
    module = made(path)
    name = next(n for n, p in module.named_parameters() if p.requires_grad)
    module.get_parameter(name).requires_grad_(False)  # one of the file's is left over
    with pytest.raises(ModelError, match=f"{name} is not what .* trained in one and not in the"):
        module.on_test_start()
    module = made(path)
    name = next(n for n, p in module.named_parameters() if n.endswith("up_proj.base_layer.weight"))
    module.get_parameter(name).requires_grad_(True)  # one that the file does not have
    with pytest.raises(ModelError, match=f"{name} is not what .* trained in one and not in the"):
        module.on_test_start()


def test_another_language_model_under_the_same_adapter_is_refused(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    """Every trained weight is there and right: only answers tell."""
    path = saved(moved(made()), tmp_path / "best.ckpt")
    other = write_tiny_llm(tmp_path / "other", seed=7)
    with pytest.raises(ModelError, match=r"does not answer as it did .* [\d.]+ apart, of which"):
        made(path, source=other).on_test_start()
    module = made(path)
    frozen = next(
        p for n, p in module.named_parameters() if n.endswith("up_proj.base_layer.weight")
    )
    frozen.data *= 1.05
    with pytest.raises(ModelError, match="does not answer as it did"):
        module.on_predict_start()
    nan = made(path)
    next(p for p in nan.parameters() if not p.requires_grad).data[:] = torch.nan
    with pytest.raises(
        ModelError, match="does not answer as it did when they were saved: nan apart"
    ):
        nan.on_test_start()


def test_a_start_that_is_tested_as_it_is_must_answer_as_it_did(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    """One that a fit goes on from is of no meaning afterwards."""
    start = saved(moved(made()), tmp_path / "best.ckpt")
    made(start=start).on_test_start()
    other = write_tiny_llm(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="does not answer as it did when they were saved"):
        made(start=start, source=other).on_test_start()
    module = made(start=start, source=other)
    module.on_fit_start()
    moved(module).on_test_start()


def test_another_scale_of_the_same_adapter_is_refused(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    """Of a checkpoint that does not say alpha, as one of another program might not."""
    path = saved(moved(made()), tmp_path / "best.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["adapter"]
    torch.save(checkpoint, path)
    made(path).on_test_start()
    with pytest.raises(ModelError, match="does not answer as it did"):
        made(path, adapter=replace(LORA, alpha=64)).on_test_start()


def test_weights_rounded_together_stay_those_of_the_fit(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A catalogue that has grown since then asks other questions; the adapter knows nothing of them."""
    rounded = {"quantization": "nf4", "rounding": "gptq"}

    def asks(*prompts: str) -> None:
        monkeypatch.setattr(InstructionModule, "calibration_prompts", lambda _: list(prompts))

    def frozen(module: Any) -> dict[str, torch.Tensor]:
        return {n: w for n, w in module.state_dict().items() if "lora_" not in n}

    asks("Yes", "No", "Will the user like Alien (1979)?")
    first = moved(made(**rounded))
    path = saved(first, tmp_path / "best.ckpt")
    asks("The user disliked Jaws (1975).", "recommend the next film of this history")
    assert not same(frozen(made(**rounded)), frozen(first)), "these prompts do round otherwise"
    for module in (made(path, **rounded), again := made(start=path, **rounded)):
        assert same(frozen(module), frozen(first))
        module.on_test_start()
    later = saved(moved(again), tmp_path / "later.ckpt")  # of a fit that began where one had ended
    asks("Yes")
    assert same(frozen(made(later, **rounded)), frozen(first))
    plain = saved(moved(made(quantization="nf4")), tmp_path / "plain.ckpt")
    assert "prompts" not in torch.load(plain, weights_only=True)[WRITTEN]
    assert not same(frozen(made(plain, **rounded)), frozen(first))  # rounded for the first time


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_another_precision_is_meant_to_answer_otherwise(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    path = saved(moved(made()), tmp_path / "best.ckpt")
    for options in ({"quantization": "nf4"}, {"dtype": "bfloat16"}):
        module = made(path, **options)
        module.on_test_start()
        answers = probe(module.model, module.tokenizer)
        assert not torch.equal(answers, torch.load(path, weights_only=True)[WRITTEN]["answers"])


def test_a_checkpoint_of_older_code_is_read_as_before(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    path = saved(moved(made()), tmp_path / "best.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[WRITTEN]
    torch.save(checkpoint, path)
    made(path).on_test_start()
    module = made(path)
    moved(module)
    with pytest.raises(ModelError, match=r"best\.ckpt holds"):
        module.on_test_start()


def test_what_is_trained_on_is_no_longer_what_was_read(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    module = made(saved(moved(made()), tmp_path / "best.ckpt"))
    module.on_fit_start()
    moved(module).on_test_start()


def test_a_probe_leaves_no_trace(made: Callable[..., Any]) -> None:
    """Dropout is off while it looks, on again behind it, and draws what it would have drawn."""
    module = moved(made())
    parts = list(module.model.modules())
    parts[3].eval()  # a part that is frozen
    modes = [part.training for part in parts]
    assert any(isinstance(part, nn.Dropout) and part.p == 0.5 for part in parts)
    state = torch.get_rng_state()
    one, two = (probe(module.model, module.tokenizer) for _ in range(2))
    assert torch.equal(one, two)
    assert not one.requires_grad
    assert abs(one.mean()) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in parts] == modes
    assert all(p.grad is None for p in module.parameters())
    module.model.eval()
    assert torch.equal(probe(module.model, module.tokenizer), one)
    head = module.model.get_output_embeddings()
    assert "forward" not in vars(head)
