"""Packed rows against the same rows padded: tokens, losses, gradients; models that cannot tell rows apart."""

from __future__ import annotations

import itertools
import json
import math
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
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from callbacks.throughput import Throughput
from datamodules.instructions import InstructionDataModule
from datamodules.samplers import GlobalBatchSampler
from datamodules.types import InstructionRows
from lightning_modules.llm.backbones import recompute_activations
from lightning_modules.llm.instruction_tuning import InstructionModule
from lightning_modules.llm.label_scoring import NO_LOSS
from lightning_modules.llm.packing import bins, pack, packed_logits, require_rows_apart, rows_apart
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from tests.lightning_modules.tiny_llm import TINY

LONGEST = 400
WORDS = ("film", "Heat (1995)", "liked", "no", "###", "the user")
ROWS = [
    (f"Say {WORDS[i % 6]}.", WORDS[i % 4] * (i % 3), " ".join(WORDS[: 1 + i % 5])) for i in range(9)
]
ADAPTERS = [
    AdapterSpec(rank=4, dropout=0.0),
    AdapterSpec("ia3"),
    AdapterSpec("full"),
]  # fmt: skip


# ---------------------------------------------------------------- which row goes where


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 60))
def test_bins_hold_each_row_once_and_are_few(lengths: list[int], room: int) -> None:
    found = bins(lengths, room)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in rows) for rows in found]
    assert all(0 < load <= room for load in loads)
    # Any fit leaves at most one sequence half empty.
    assert sum(load <= room / 2 for load in loads) <= 1
    assert len(bins(lengths, math.inf)) == min(1, len(lengths))


def test_a_row_longer_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 9 tokens, more than the 8 of a sequence"):
        bins([3, 9], 8)


ROW = st.lists(st.integers(4, 90), min_size=1, max_size=20).flatmap(
    lambda ids: st.tuples(
        st.just(ids), st.lists(st.just(NO_LOSS) | st.integers(4, 90), max_size=len(ids))
    )
)


@given(st.lists(ROW, min_size=1, max_size=9), st.sampled_from([20, 33, math.inf]))
def test_packed_rows_can_be_taken_apart(rows: list[tuple[list[int], list[int]]], room: Any) -> None:
    batch = pack([read for read, _ in rows], [said for _, said in rows], room, 3, 2.0)
    assert batch.positions is not None
    assert batch.columns is not None
    assert batch.tokens.shape[1] <= room
    assert len(batch.tokens) == 1 or room < math.inf
    answers = torch.full_like(batch.tokens, NO_LOSS)
    answers[:, batch.columns] = batch.answers
    found = []
    for ids, said, at, mask in zip(
        batch.tokens, answers, batch.positions, batch.token_mask, strict=True
    ):
        begins = [*np.flatnonzero(at == 0).tolist(), len(at)]
        for start, stop in itertools.pairwise(begins):
            assert at[start:stop].tolist() == list(range(stop - start))
            assert len(set(mask[start:stop].tolist())) == 1
            if mask[start]:
                found.append((ids[start:stop].tolist(), said[start:stop].tolist()))
            else:
                assert stop == len(at)
                assert set(ids[start:stop].tolist()) == {3}
                assert set(said[start:stop].tolist()) == {NO_LOSS}
    expected = [(read, [NO_LOSS] * (len(read) - len(said)) + said) for read, said in rows]
    assert sorted(found) == sorted(expected)


def test_the_mask_is_a_triangle_for_each_row() -> None:
    seen = rows_apart(torch.tensor([[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]))
    for mask, sizes in zip(seen[:, 0], ([2, 3], [1, 2, 2]), strict=True):
        blocks = torch.block_diag(*(torch.ones(size, size).tril() for size in sizes))
        assert torch.equal(mask.float(), blocks)


# ---------------------------------------------------------------- the same loss, the same gradients


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write(tmp_path_factory.mktemp(name), longest=LONGEST) for name, write in TINY.items()
    }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))


@pytest.fixture
def made(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A module as a trainer would have it, its model loaded, its adapter moved away from its start."""

    def build(
        family: str, adapter: AdapterSpec = ADAPTERS[0], attention: Any = "sdpa", **options: Any
    ) -> InstructionModule:
        spec = BackboneSpec(
            str(folders[family]), dtype="float32", chat_template=False, max_length=LONGEST,
            attention=attention,
        )  # fmt: skip
        module = InstructionModule(spec, adapter, **options)
        texts = pl.DataFrame(ROWS, schema=["instruction", "input", "output"], orient="row")
        data = SimpleNamespace(seed=0, prepared=SimpleNamespace(digest="x"), rows=texts)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        trainer = SimpleNamespace(
            datamodule=data, strategy=strategy, precision_plugin=None, is_global_zero=True
        )
        monkeypatch.setattr(InstructionModule, "trainer", trainer)
        monkeypatch.setattr(module, "log_train_loss", lambda loss: None)
        module.configure_model()
        draw = torch.Generator().manual_seed(1)
        for weight in (p for p in module.parameters() if p.requires_grad):
            weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
        return module

    return build


def losses_and_gradients(module: Any, micro_batches: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one optimizer step over all rows, in micro batches as Lightning accumulates them."""
    every = InstructionRows(module.trainer.datamodule.rows, np.arange(len(ROWS)))
    sampler = GlobalBatchSampler(
        module.row_lengths(every), len(ROWS), micro_batches=micro_batches,
        target_counts=module.target_counts(every),
    )  # fmt: skip
    collate, total = module.collator(training=True), 0.0
    module.zero_grad()
    for part in sampler:
        batch = collate(
            replace(every, row=part.row, filler=part.filler, normaliser=part.normaliser)
        )
        assert (batch.positions is not None) == module.packing
        if module.packing:
            assert len(batch.tokens) < len(part.row) or len(part.row) == 1
        loss = module.training_step(batch, 0) / micro_batches
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "attention", "adapter", "loss", "micro_batches"),
    [
        ("llama", "sdpa", ADAPTERS[0], "answer", 1), ("llama", "sdpa", ADAPTERS[0], "prompt", 4),
        ("llama", "eager", ADAPTERS[0], "prompt", 1), ("llama", "sdpa", ADAPTERS[1], "answer", 3),
        ("llama", "sdpa", ADAPTERS[2], "answer", 2), ("opt", "sdpa", ADAPTERS[0], "answer", 2),
        ("opt", "eager", ADAPTERS[0], "prompt", 1), ("llama", "sdpa", ADAPTERS[0], "answer", 12),
        ("gemma", "sdpa", ADAPTERS[0], "answer", 1), ("gemma", "eager", ADAPTERS[0], "prompt", 2),
        ("mistral", "sdpa", ADAPTERS[0], "prompt", 1),
    ],
)  # fmt: skip
def test_packing_changes_neither_loss_nor_gradients(
    family: str, attention: Any, adapter: AdapterSpec, loss: Any, micro_batches: int,
    made: Callable[..., Any],
) -> None:  # fmt: skip
    settings = {"adapter": adapter, "attention": attention, "loss": loss}
    plain, expected = losses_and_gradients(made(family, **settings), 1)
    packed, found = losses_and_gradients(made(family, packing=True, **settings), micro_batches)
    assert packed == pytest.approx(plain, abs=1e-5)
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


def test_recomputed_activations_change_nothing(made: Callable[..., Any]) -> None:
    expected, first = losses_and_gradients(made("llama", packing=True), 2)
    module = made("llama", packing=True)
    recompute_activations(module.model)
    found, second = losses_and_gradients(module, 2)
    assert found == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(second, first)


def fitted(folder: Path, file: Path, micro: int, **options: Any) -> tuple[Any, Throughput, Any]:
    """A module after two epochs in micro batches."""
    lightning.seed_everything(0, verbose=False)
    data = InstructionDataModule(str(file))
    data.batch_size = 9
    spec = BackboneSpec(str(folder), dtype="float32", chat_template=False, max_length=LONGEST)
    module = InstructionModule(spec, ADAPTERS[0], learning_rate=0.01, warmup_steps=0, **options)
    speed = Throughput()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", accumulate_grad_batches=micro, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, callbacks=[speed],
    )  # fmt: skip
    trainer.fit(module, data)
    return module, speed, trainer.callback_metrics["val/loss"].item()


def test_a_fit_of_packed_rows_is_the_fit_of_padded_ones(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    rows = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in ROWS * 2]
    file.write_text(json.dumps(rows))
    plain, padded, loss = fitted(folders["llama"], file, 1)
    packed, speed, packed_loss = fitted(folders["llama"], file, 3, packing=True)
    assert packed_loss == pytest.approx(loss, abs=1e-4)
    first, second = (
        torch.cat([p.flatten() for p in module.parameters() if p.requires_grad])
        for module in (plain, packed)
    )
    torch.testing.assert_close(second, first, atol=2e-4, rtol=0)
    assert speed.counts()[:2] == padded.counts()[:2]
    assert set(speed.summary()) - set(padded.summary()) == {"padding_without_packing"}


# ---------------------------------------------------------------- what cannot be packed


def read_alone(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([row])).logits[0] for row in rows]


@torch.no_grad()
def test_positions_alone_tell_rows_apart_where_transformers_takes_them(
    folders: dict[str, Path],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    batch = pack(rows, [row[1:] for row in rows], math.inf, 3, 1.0)
    assert batch.positions is not None
    every = torch.arange(9)
    found = packed_logits(model, batch.tokens, batch.positions, every, "flash_attention_2")[0]
    order = [rows[0], rows[2], rows[1]]  # the longest first
    torch.testing.assert_close(found, torch.cat(read_alone(model, order)), atol=1e-5, rtol=1e-5)
    require_rows_apart(model, "flash_attention_2")


def test_a_model_whose_rows_see_one_another_is_refused(folders: dict[str, Path]) -> None:
    # OPT does not tell transformers' masks where rows begin.
    model = AutoModelForCausalLM.from_pretrained(folders["opt"], dtype=torch.float32)
    require_rows_apart(model, "sdpa")
    with pytest.raises(ValueError, match="lets packed rows see one another: set packing=false"):
        require_rows_apart(model, "flash_attention_2")


def test_dropout_does_not_look_like_another_row(made: Callable[..., Any]) -> None:
    module = made("llama", adapter=AdapterSpec(rank=4, dropout=0.5), packing=True)
    state = torch.get_rng_state()
    require_rows_apart(module.model, "sdpa")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_vectors_before_the_text_are_refused(method: Any, folders: dict[str, Path]) -> None:
    spec = BackboneSpec(str(folders["llama"]), chat_template=False, max_length=LONGEST)
    with pytest.raises(ValueError, match=f"adapter {method} puts vectors before a sequence"):
        InstructionModule(spec, AdapterSpec(method), packing=True)
    InstructionModule(spec, AdapterSpec(method))
