"""Instruction tuning: tokens and what is cut, the loss against transformers', where an adapter starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from datamodules.instructions import InstructionDataModule
from datamodules.sources import DataSourceError
from datamodules.types import InstructionRows
from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import save_adapter
from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer
from lightning_modules.llm.instruction_tokens import (
    LEAST_ANSWER,
    InstructionTokens,
    prompt_and_answer,
)
from lightning_modules.llm.instruction_tuning import InstructionModule
from lightning_modules.llm.layouts import answered, lay_out
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.targets import linear_paths
from tests.lightning_modules.tiny_llm import write_tiny_llm

LONGEST = 160
ROWS = [
    ("Add the numbers.", "1 and 2", "3"),
    ("Name a film.", "", "Heat (1995), which is long"),
    ("Answer.", "Is Jaws (1975) old?", "Yes"),
    ("Say no.", "", "No"),
]
ADAPTER = AdapterSpec(rank=4, dropout=0.0, targets=("q_proj", "v_proj"))


def table(rows: list[tuple[str, str, str]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["instruction", "input", "output"], orient="row")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llm(tmp_path_factory.mktemp("llm"), longest=LONGEST)


@pytest.fixture(scope="module")
def spec(folder: Path) -> BackboneSpec:
    return BackboneSpec(str(folder), dtype="float32", chat_template=False, max_length=LONGEST)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))


@pytest.fixture
def made(spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A module as a trainer would have it, its model loaded."""

    def build(adapter: AdapterSpec = ADAPTER, **options: Any) -> InstructionModule:
        module = InstructionModule(spec, adapter, **options)
        data = SimpleNamespace(seed=0, prepared=SimpleNamespace(digest="x"), rows=table(ROWS))
        strategy = SimpleNamespace(
            root_device=torch.device("cpu"), reduce=lambda sums, reduce_op: sums
        )
        trainer = SimpleNamespace(
            datamodule=data, strategy=strategy, precision_plugin=None, global_step=3,
            is_global_zero=True,
        )  # fmt: skip
        monkeypatch.setattr(InstructionModule, "trainer", trainer)
        module.configure_model()
        return module

    return build


def logged(module: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    found: dict[str, float] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: found.update({name: float(value)}))
    return found


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("chat", [True, False])
def test_prompt_and_answer_are_the_layouts(spec: BackboneSpec, chat: bool) -> None:
    tokenizer = load_tokenizer(spec)
    for text, (prompt, answer) in zip(ROWS, prompt_and_answer(tokenizer, chat, ROWS), strict=True):
        asked = lay_out(tokenizer, chat, *text[:2])
        assert prompt == tokenizer(asked, add_special_tokens=not chat)["input_ids"]
        assert tokenizer.decode(prompt) == asked
        assert tokenizer.decode(answer) == f"{text[2]}</s>"
        assert answer[-1] == tokenizer.eos_token_id
    assert answered(tokenizer, chat, "a", "", "b")[1] == "b</s>"


def test_an_answer_that_would_change_the_prompts_tokens_is_tokenised_alone() -> None:
    class Pairs:
        """Two letters a token, from the left: an odd prompt shares a token with its answer."""

        eos_token = ""

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            cut = [[t[i : i + 2] for i in range(0, len(t), 2)] for t in texts]
            return {"input_ids": [[sum(map(ord, pair)) for pair in t] for t in cut]}

    odd, even = lay_out(None, False, "a"), lay_out(None, False, "ab")
    assert len(odd) % 2 != len(even) % 2
    for instruction in ("a", "ab"):
        ((prompt, answer),) = prompt_and_answer(Pairs(), False, [(instruction, "", "xy")])
        assert prompt == Pairs()([lay_out(None, False, instruction)])["input_ids"][0]
        assert answer == [ord("x") + ord("y")]


def tokens_of(
    spec: BackboneSpec, rows: list[tuple[str, str, str]], limit: int
) -> InstructionTokens:
    return InstructionTokens(load_tokenizer(spec), table(rows), f"{rows}", limit, False)


def test_what_is_too_long_loses_its_input_then_its_answers_end(spec: BackboneSpec) -> None:
    tokenizer = load_tokenizer(spec)
    base = len(prompt_and_answer(tokenizer, False, [("Do.", "", "xyz")])[0][0])
    limit = base + LEAST_ANSWER + 30
    rows = [
        ("Do.", "", "xyz"),
        ("Do.", "qwv " * 200, "xyz"),
        ("Do.", "qwv", "#" * 400),
        ("#" * (LEAST_ANSWER + 31), "", "xyz" * 9),
        ("#" * 26, "", "#" * LEAST_ANSWER * 2),
    ]
    found = tokens_of(spec, rows, limit)
    read = [found.of(row) for row in range(5)]
    texts = [(tokenizer.decode(ids[:p]), tokenizer.decode(ids[p:])) for ids, p in read]
    assert texts[0] == (lay_out(tokenizer, False, "Do."), "xyz</s>")
    assert texts[1][1] == "xyz</s>"  # the answer is whole
    assert limit - 4 <= found.lengths[1] <= limit  # no more of the input went than had to
    kept = texts[1][0].partition("### Input:\n")[2].partition("\n\n### Response")[0]
    assert kept
    assert ("qwv " * 200).startswith(kept)
    assert texts[2][0] == lay_out(tokenizer, False, "Do.")
    assert texts[2][1] == "#" * (limit - base)  # the answer's first tokens, without an end
    assert found.lengths.tolist()[3] == 0
    assert found.lengths[4] == limit
    assert (found.cut.inputs, found.cut.answers, found.cut.left_out) == (1, 2, 1)
    assert "of 5 instructions, 1 lose the end of their input, 2 that" in str(found.told())
    again = tokens_of(spec, rows, limit)  # from the file of the first
    assert again.lengths.tolist() == found.lengths.tolist()
    assert again.cut == found.cut
    assert tokens_of(spec, rows[:1], limit).told() is None


@given(st.lists(st.tuples(st.text("ab# ", min_size=1, max_size=40), st.text("ab# \n", max_size=200),
                          st.text("ab#", min_size=1, max_size=200)), min_size=1, max_size=4),
       st.integers(60, 150))  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_no_row_is_longer_than_the_limit_or_loses_its_answers_beginning(
    folder: Path, rows: list[tuple[str, str, str]], limit: int
) -> None:
    spec = BackboneSpec(str(folder), chat_template=False, max_length=LONGEST)
    tokenizer, found = load_tokenizer(spec), tokens_of(spec, rows, limit)
    left_out = 0
    for number, (text, length) in enumerate(zip(rows, found.lengths, strict=True)):
        bare, answer = prompt_and_answer(tokenizer, False, [(text[0], "", text[2])])[0]
        if length == 0:
            left_out += 1
            assert limit - len(bare) < min(LEAST_ANSWER, len(answer))
            continue
        assert length <= limit
        ids, prompt = found.of(number)
        assert len(ids) - prompt >= min(LEAST_ANSWER, len(answer))
        assert answer[: len(ids) - prompt] == ids[prompt:]
    assert found.cut.left_out == left_out


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("loss", ["answer", "prompt"])
def test_the_loss_is_a_sum_over_tokens_over_the_global_count(
    loss: Any, made: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made(loss=loss)
    said = logged(module, monkeypatch)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums, counts = [], []
    for prompt, answer in prompt_and_answer(module.tokenizer, False, ROWS):
        whole = torch.tensor([prompt + answer])
        labels = whole.clone()
        if loss == "answer":
            labels[:, : len(prompt)] = -100
        counts.append(int((labels[:, 1:] != -100).sum()))
        sums.append(plain(whole, labels=labels).loss.item() * counts[-1])
    every = InstructionRows(table(ROWS), np.arange(4))
    assert module.target_counts(every).tolist() == counts
    collate = module.collator(training=True)
    batch = collate(replace(every, normaliser=float(sum(counts))))
    whole_loss = module.training_step(batch, 0).item()
    assert whole_loss == pytest.approx(sum(sums) / sum(counts), abs=1e-5)
    assert said["train/loss"] == pytest.approx(whole_loss)
    # Two micro batches on two devices: the mean of four shards is the same number.
    shards = [replace(every, row=np.array([i]), normaliser=sum(counts) / 4) for i in range(4)]
    parts = [module.training_step(collate(shard), 0).item() for shard in shards]
    assert np.mean(parts) == pytest.approx(whole_loss, abs=1e-5)
    filled = replace(every, filler=np.array([False, True, False, True]), normaliser=1.0)
    assert module.training_step(collate(filled), 0).item() == pytest.approx(
        sums[0] + sums[2], rel=1e-5
    )
    module.on_validation_epoch_start()
    for rows in ([0, 2, 3], [1]):
        module.validation_step(collate(replace(every, row=np.array(rows))), 0)
    module.on_validation_epoch_end()
    assert said["val/loss"] == pytest.approx(sum(sums) / sum(counts), abs=1e-5)


def test_what_is_cut_is_told_once(
    spec: BackboneSpec, made: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        module = made()
        module.llm = replace(spec, max_length=80)
        counts = module.target_counts(InstructionRows(table(ROWS), np.arange(4)))
        _ = module.tokens
    assert (counts >= 0).all()
    assert [r.message for r in caplog.records if "llm.max_length=80" in r.message] != []


def test_an_unknown_loss_and_a_start_of_nothing_are_refused(spec: BackboneSpec) -> None:
    with pytest.raises(ValueError, match="loss is 'margin', expected one of answer, prompt"):
        InstructionModule(spec, ADAPTER, loss="margin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing can start from somewhere"):
        InstructionModule(spec, AdapterSpec("none"), start="somewhere")


def fitted(spec: BackboneSpec, file: Path, micro: int) -> tuple[InstructionModule, Any]:
    """A module after four epochs in micro batches, and its trainer."""
    lightning.seed_everything(0, verbose=False)
    data = InstructionDataModule(str(file))
    data.batch_size = 5
    module = InstructionModule(spec, ADAPTER, learning_rate=0.02, warmup_steps=0)
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", accumulate_grad_batches=micro, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    return module, trainer


def test_a_fit_learns_its_rows_and_accumulation_changes_nothing(
    spec: BackboneSpec, tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    rows = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in ROWS * 3]
    file.write_text(json.dumps(rows))
    (whole, trainer), (parts, _) = (fitted(spec, file, micro) for micro in (1, 3))
    first, second = (
        torch.cat([p.flatten() for p in module.parameters() if p.requires_grad])
        for module in (whole, parts)
    )
    torch.testing.assert_close(second, first, atol=2e-4, rtol=0)
    texts = trainer.datamodule.rows
    every = InstructionRows(texts, np.flatnonzero(texts["split"].to_numpy() == 0))
    with torch.no_grad():
        whole.eval()
        tuned = whole.summed_loss(whole.collator(False)(every)).item()
        with whole.model.disable_adapter():
            base = whole.summed_loss(whole.collator(False)(every)).item()
    assert tuned < 0.8 * base
    assert "val/loss" in trainer.callback_metrics


# ---------------------------------------------------------------- where an adapter starts


@pytest.fixture
def trained(made: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """``trained(kind, adapter)``: an adapter whose weights are elsewhere, as a folder or a checkpoint."""

    def write(kind: str, adapter: AdapterSpec = ADAPTER) -> Path:
        module = made(adapter)
        draw = torch.Generator().manual_seed(1)
        for weight in (p for p in module.parameters() if p.requires_grad):
            weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
        path = tmp_path / kind
        if kind == "folder":
            save_adapter(module.model, path)
        else:
            checkpoint = {"state_dict": dict(module.state_dict())}
            module.on_save_checkpoint(checkpoint)
            torch.save(checkpoint, path)
        return path

    return write


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


OTHERS = [AdapterSpec("ia3"), AdapterSpec("prompt", num_virtual_tokens=3)]


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [*((k, a) for k in ("folder", "some.ckpt") for a in (ADAPTER, *OTHERS)),
     ("some.ckpt", AdapterSpec("full"))],
)  # fmt: skip
def test_a_fit_starts_from_an_adapter_and_goes_on_training_it(
    kind: str, adapter: AdapterSpec, made: Callable[..., Any], trained: Callable[..., Path]
) -> None:
    start = trained(kind, adapter)
    draw = torch.Generator().manual_seed(1)
    module = made(adapter, start=str(start))
    expected = {
        n: 0.1 * torch.randn(p.shape, generator=draw) for n, p in weights_of(module).items()
    }
    found = weights_of(module)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    with pytest.raises(ModelError, match=r"still that of .* after 3 steps"):
        module.on_train_end()
    next(p for p in module.parameters() if p.requires_grad).data += 1
    module.on_train_end()


def test_a_checkpoint_that_is_loaded_wins_over_the_start(
    made: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    start = trained("folder")
    module = made(start=str(start))
    checkpoint = {"state_dict": {n: torch.zeros_like(p) for n, p in weights_of(module).items()}}
    torch.save(checkpoint, tmp_path / "later.ckpt")
    module.load_weights(tmp_path / "later.ckpt")
    assert all((weight == 0).all() for weight in weights_of(module).values())


@pytest.mark.parametrize("kind", ["folder", "some.ckpt"])
@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(ADAPTER, rank=8), r"its (rank|r) is 8, here 4"),
        (replace(ADAPTER, alpha=64), r"its (lora_)?alpha is 64, here 16"),
        (
            replace(ADAPTER, targets=("q_proj", "o_proj")),
            r"also adapts o_proj; it does not adapt v_proj",
        ),
        (
            replace(ADAPTER, targets="all-linear"),
            r"also adapts down_proj, gate_proj, k_proj, o_proj",
        ),
        (replace(ADAPTER, method="rslora"), r"its (method is rslora|use_rslora is True)"),
        (AdapterSpec("ia3"), r"its (method is ia3|peft_type is IA3)"),
    ],
)
def test_another_kind_of_adapter_is_refused(
    kind: str, other: AdapterSpec, told: str, made: Callable[..., Any], trained: Callable[..., Path]
) -> None:
    start = trained(kind, other)
    with pytest.raises(DataSourceError, match=told):
        made(start=str(start))


def test_an_adapter_whose_beginning_moved_frozen_weights_is_refused(
    spec: BackboneSpec, made: Callable[..., Any], tmp_path: Path
) -> None:
    """PiSSA trains the largest singular vectors of a weight, and freezes the weight without them."""
    model = load_causal_lm(spec, "cpu")
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    config = LoraConfig(
        r=4, target_modules=linear_paths(model, ADAPTER.targets), lora_alpha=ADAPTER.alpha,
        init_lora_weights="pissa", task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj.base_layer.weight, before)
    adapted.save_pretrained(str(tmp_path / "pissa"))
    with pytest.raises(DataSourceError, match="its init_lora_weights is pissa, which has moved"):
        made(start=str(tmp_path / "pissa"))


def test_an_adapter_of_another_language_model_is_refused(
    made: Callable[..., Any], trained: Callable[..., Path]
) -> None:
    start = trained("folder")
    stored = load_file(start / "adapter_model.safetensors")
    name = next(n for n in sorted(stored) if "lora_A" in n)
    stored[name] = torch.zeros(4, 99)
    save_file(stored, start / "adapter_model.safetensors")
    with pytest.raises(DataSourceError, match=r"lora_A.weight is \(4, 99\), here \(4, 64\)"):
        made(start=str(start))


def test_a_start_that_is_none_says_what_is_missing(
    made: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataSourceError, match=r"no readable adapter_model\.safetensors"):
        made(start=str(tmp_path / "empty"))
    (tmp_path / "text.ckpt").write_text("no weights")
    for name in ("text.ckpt", "nowhere.ckpt"):
        with pytest.raises(DataSourceError, match="neither an adapter's folder nor a checkpoint"):
            made(start=str(tmp_path / name))
    start = trained("folder")
    (start / "adapter_config.json").write_text("{")
    with pytest.raises(DataSourceError, match=r"adapter_config.json cannot be read"):
        made(start=str(start))
    with pytest.raises(DataSourceError, match="adapter full trains the weights themselves"):
        made(AdapterSpec("full"), start=str(start))
