"""What must hold of adapters and frozen weights: each guard against the mistake that it is for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_modules.errors import ModelError
from lightning_modules.llm.guards import digests, moved, require_same_adapter, some
from lightning_modules.llm.instruction_tuning import InstructionModule
from lightning_modules.llm.precision import QLoRAPrecision
from lightning_modules.llm.sharding import ShardedStrategy
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from tests.lightning_modules.tiny_llm import LONGEST, write_tiny_llm, write_tiny_opt

LORA = AdapterSpec(rank=4, dropout=0.0, targets=("q_proj", "v_proj"))
TOKENS = torch.arange(4, 24).reshape(2, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llm(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A module as a trainer would have it; ``load=False`` leaves it empty."""

    def build(
        adapter: AdapterSpec = LORA, quantization: Any = None, load: bool = True, **options: Any
    ) -> Any:
        spec = BackboneSpec(
            str(folder), dtype="float32", quantization=quantization, max_length=LONGEST
        )
        module = InstructionModule(spec, adapter, **options)
        trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            precision_plugin=QLoRAPrecision.for_spec(spec) if quantization else None,
            datamodule=SimpleNamespace(seed=0), global_step=3, num_test_batches=[1],
        )  # fmt: skip
        monkeypatch.setattr(InstructionModule, "trainer", trainer)
        if load:
            module.configure_model()
        return module

    return build


def saved(module: Any, path: Path) -> Path:
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def stepped(module: Any) -> Any:
    """After two steps: LoRA's A has a gradient once B has moved."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        module.model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return module


# ---------------------------------------------------------------- whose weights they are


@pytest.mark.parametrize(
    ("stored", "told"),
    [(replace(LORA, method="rslora"), r"rslora \(rank 4, alpha 16, targets \['q_proj', 'v_proj'\]\)"),
     (replace(LORA, alpha=32), r"lora \(rank 4, alpha 32"),
     (replace(LORA, rank=8), r"lora \(rank 8, alpha 16"),
     (replace(LORA, targets="all-linear"), r"lora \(rank 4, alpha 16, targets all-linear\)"),
     (AdapterSpec("ia3"), r"ia3 \(targets all-linear\)"),
     (AdapterSpec("prompt", num_virtual_tokens=3), r"prompt \(num_virtual_tokens 3\)"),
     (AdapterSpec("full"), "full")],
)  # fmt: skip
def test_weights_of_another_adapter_are_refused(stored: AdapterSpec, told: str) -> None:
    own = r"module\.adapter is lora \(rank 4, alpha 16, targets \['q_proj', 'v_proj'\]\): set"
    with pytest.raises(ModelError, match=rf"x\.ckpt was trained with adapter {told}.*{own}"):
        require_same_adapter(Path("x.ckpt"), asdict(stored), LORA)


@pytest.mark.parametrize(
    ("stored", "own"),
    [(LORA, LORA), (LORA, replace(LORA, dropout=0.5, num_virtual_tokens=2)),
     (LORA, replace(LORA, targets=("v_proj", "q_proj"))),
     (AdapterSpec("full", rank=2), AdapterSpec("full")), (AdapterSpec("none"), AdapterSpec("none"))],
)  # fmt: skip
def test_what_changes_no_score_may_differ(stored: AdapterSpec, own: AdapterSpec) -> None:
    fields = asdict(stored)
    given = fields["targets"]
    fields["targets"] = given if isinstance(given, str) else list(given)
    require_same_adapter(Path("x.ckpt"), fields, own)
    require_same_adapter(Path("older.ckpt"), None, own)


def test_a_checkpoint_of_another_alpha_is_not_loaded(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    path = saved(stepped(made()), tmp_path / "best.ckpt")
    made().load_weights(path)
    with pytest.raises(ModelError, match=r"alpha 16, .* is rslora \(rank 4, alpha 16"):
        made(replace(LORA, method="rslora")).load_weights(path)
    late = made(replace(LORA, alpha=1), load=False)
    late.load_weights(path)  # nothing is there yet
    with pytest.raises(ModelError, match=r"is lora \(rank 4, alpha 1, "):
        late.configure_model()


# ---------------------------------------------------------------- that there are some


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix", "full"])
def test_an_adapter_without_weights_is_not_tested(
    made: Callable[..., Any], tmp_path: Path, method: Any
) -> None:
    module = made(AdapterSpec(method), load=False)
    for stage in ("test", "predict"):
        with pytest.raises(ModelError, match=rf"{method} was given no weights.*method=none"):
            module.setup(stage)
    module.setup("fit")
    module.configure_model()
    module.setup("test")  # what was trained in this process is there
    made(AdapterSpec("none"), load=False).setup("test")
    made(AdapterSpec(method), load=False, start=str(tmp_path)).setup("test")
    given = made(AdapterSpec(method), load=False)
    given.load_weights(tmp_path / "best.ckpt")
    given.setup("test")


def test_untrained_weights_are_not_tested_and_not_exported(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    module = made()
    module.load_weights(saved(module, tmp_path / "new.ckpt"))
    ways: list[Callable[[], Any]] = [
        module.on_test_start, module.on_predict_start,
        lambda: module.export(tmp_path / "export", torch.device("cpu")),
    ]  # fmt: skip
    for use in ways:
        with pytest.raises(ModelError, match=r"lora adapter of .*new\.ckpt is untrained"):
            use()
    trained = stepped(made())
    trained.load_weights(saved(trained, tmp_path / "best.ckpt"))
    trained.on_test_start()
    made(AdapterSpec("none")).on_test_start()
    made(AdapterSpec("prompt")).on_predict_start()  # whose weights do not tell


# ---------------------------------------------------------------- what a fit has moved


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_what_is_frozen_stays_as_it_is(made: Callable[..., Any], quantization: Any) -> None:
    module = made(quantization=quantization)
    module.on_fit_start()
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    assert set(module._frozen) == set(frozen)  # the tiny model has no biases
    assert len(frozen) > 15
    stepped(module).on_train_end()
    for name, weight in frozen.items():  # each of them, whatever its place
        flat = weight.data.view(-1)
        was = flat[0].clone()
        flat[0] += 1
        with pytest.raises(RuntimeError, match=rf"{name} is frozen, and has moved in 3 steps"):
            module.on_train_end()
        flat[0] = was
    module.on_train_end()


def test_biases_that_quantized_layers_cast_are_no_alarm(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    module = made(load=False)
    folder = str(write_tiny_opt(tmp_path))
    module.llm = replace(module.llm, source=folder, chat_template=False)
    module.configure_model()
    module.on_fit_start()
    stepped(module)
    for name, weight in module.named_parameters():
        if name.endswith("bias"):
            weight.data = weight.data.bfloat16()
    module.on_train_end()


def test_split_weights_are_not_gathered_to_look_at_them(made: Callable[..., Any]) -> None:
    module = made()
    module.trainer.strategy = ShardedStrategy(2)
    module.on_fit_start()
    assert module._frozen == {}


@pytest.mark.parametrize("method", ["prompt", "prefix", "full"])
def test_vectors_and_whole_models_that_have_not_moved_are_an_alarm(
    made: Callable[..., Any], method: Any
) -> None:
    module = made(AdapterSpec(method, num_virtual_tokens=2))
    with pytest.raises(ModelError, match=f"adapter {method} is as it was made after 3 steps"):
        module.on_train_end()
    stepped(module).on_train_end()


def test_a_digest_tells_a_bit_and_samples_large_weights() -> None:
    large = torch.zeros(3 * 2**14)
    weights = {"a": torch.ones(2), "b": torch.ones(2), "c": large.bfloat16(), "d": large}
    before = digests(weights.items())
    assert list(before) == list(weights)
    assert moved(before, digests(weights.items())) == []
    large[1] = 1.0  # every third counts
    assert moved(before, digests(weights.items())) == []
    large[3] = 1e-38
    weights["b"][0] = weights["a"][0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert moved(before, digests(weights.items())) == ["a", "b", "d"]
    assert digests([]) == {}
    assert [name for name, _ in some(weights.items())] == ["a", "c", "d"]
    assert some([]) == []


def test_a_sample_meets_every_column_of_a_table() -> None:
    table = torch.zeros(
        2**10, 2**6
    )  # four times what is sampled: a step of four would miss most columns
    before = digests([("table", table)])
    for column in range(table.shape[1]):
        table[:, column] += 1
        assert moved(before, digests([("table", table)])) == ["table"]
        table[:, column] -= 1


def test_two_hundred_weights_are_looked_at_in_less_than_a_second() -> None:
    large = torch.ones(2**22)
    weights = [(str(i), large) for i in range(200)]
    began = time.process_time()
    assert len(digests(weights)) == 200
    assert time.process_time() - began < 1
