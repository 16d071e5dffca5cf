"""What is computed in other ways on other devices, by one body: shared prompts, packed rows, merged exports.

The CPU runs here; ``python -m pytest -m gpu`` runs the same on a CUDA device. A bound is a share of the
expected numbers' spread. In float32 only the order of sums differs, 4-bit weights or not. In bfloat16 each of
some ten products of a layer rounds by up to 0.4%, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lightning_modules.llm.adapters import attach_adapter
from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer
from lightning_modules.llm.branches import ReadPrompts
from lightning_modules.llm.candidate_scoring import candidate_log_likelihoods
from lightning_modules.llm.export import export_model
from lightning_modules.llm.label_scoring import (
    NO_LOSS,
    SharedPrefix,
    answer_losses,
    last_logits,
    pad_left,
)
from lightning_modules.llm.packing import pack, packed_logits, require_rows_apart
from lightning_modules.llm.precision import QLoRAPrecision
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from tests.lightning_modules.tiny_llm import write_wide_llm

LONGEST = 160
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
WAYS: list[Any] = [
    ("float32", None), ("bfloat16", None), ("float32", "nf4"), ("bfloat16", "nf4-dq"),
]  # fmt: skip
NEAR = {"float32": 1e-4, "bfloat16": 0.03}
PROMPTS = [list(range(10, 40)), list(range(60, 72)), [5, 9]]
CANDIDATES = [[[80, 81, 82], [90], [91, 92]], [[101, 7], [5, 6, 7, 8]], [[33], [12, 13], [14], [9]]]


@dataclass(frozen=True)
class Made:
    """An adapted model on a device, and how a trainer lets it compute."""

    model: Any
    spec: BackboneSpec
    device: str

    @contextmanager
    def computing(self) -> Iterator[None]:
        half = self.spec.dtype == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16, enabled=half):
            yield

    @property
    def near(self) -> float:
        return NEAR[self.spec.dtype]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide_llm(tmp_path_factory.mktemp("llama"), LONGEST)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(filter(None, way)))
def made(request: pytest.FixtureRequest, tiny: Path, device: str) -> Made:
    """Adapted by weights that change every answer."""
    dtype, mode = request.param
    spec = BackboneSpec(
        str(tiny), dtype=dtype, quantization=mode, chat_template=False, max_length=LONGEST
    )
    plugin = QLoRAPrecision.for_spec(spec) if mode else None
    config = plugin.quantization_config(device) if plugin else None
    model = load_causal_lm(spec, torch.device(device), config)
    model = plugin.convert_module(model) if plugin else model
    adapted = attach_adapter(model, AdapterSpec(rank=8, dropout=0.0), seed=0).eval()
    draw = torch.Generator().manual_seed(0)
    for weight in (p for p in adapted.parameters() if p.requires_grad):
        weight.data += (0.05 * torch.randn(weight.shape, generator=draw)).to(device)
    return Made(adapted, spec, device)


def apart(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors as a share of the second's spread."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / (expected - expected.mean()).norm())


def batch(rows: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    tokens, mask = pad_left(rows, 3)
    return tokens.to(device), mask.to(device)


def alone(made: Made, ids: Sequence[int]) -> Tensor:
    """Logits (L, V) of one text, without padding, masks or caches."""
    return made.model(input_ids=torch.tensor([ids], device=made.device)).logits[0].float()


@torch.no_grad()
def test_candidates_behind_a_shared_prompt_score_as_one_at_a_time(made: Made) -> None:
    """Every candidate's log-likelihood, and which is the best of each prompt."""
    with made.computing():
        found = candidate_log_likelihoods(made.model, PROMPTS, CANDIDATES, pad=3).total.cpu()
        expected = []
        for prompt, row in zip(PROMPTS, CANDIDATES, strict=True):
            for candidate in row:
                logits = alone(made, prompt + candidate).log_softmax(-1).cpu()
                places = torch.arange(len(prompt) - 1, len(prompt) + len(candidate) - 1)
                expected.append(logits[places, torch.tensor(candidate)].sum())
    real = [len(row) for row in CANDIDATES]
    each = torch.cat([row[:size] for row, size in zip(found, real, strict=True)])
    naive = torch.stack(expected)
    assert apart(each, naive) < made.near
    if made.spec.dtype == "float32":  # bfloat16 may turn near ties
        ours, theirs = (x.split(real) for x in (each, naive))
        assert [int(r.argmax()) for r in ours] == [int(r.argmax()) for r in theirs]


@torch.no_grad()
def test_branches_behind_a_prompt_that_was_read_end_as_one_at_a_time(made: Made) -> None:
    branches = [row[:2] for row in CANDIDATES]
    with made.computing():
        read = ReadPrompts(made.model, *batch(PROMPTS, made.device))
        found = read.end_logits(branches, (40, 41, 42), pad=3)  # (B, 2, 3)
        expected = torch.stack([
            torch.stack([alone(made, prompt + branch)[-1, [40, 41, 42]] for branch in row])
            for prompt, row in zip(PROMPTS, branches, strict=True)
        ])  # fmt: skip
    assert apart(found, expected) < made.near


@torch.no_grad()
def test_what_all_prompts_begin_with_is_read_once(made: Made) -> None:
    opening = list(range(100, 120))
    rows = batch([opening + prompt for prompt in PROMPTS], made.device)
    with made.computing():
        whole = last_logits(made.model, *rows, keep=2)
        shared = SharedPrefix(made.model, opening).last_logits(*rows, keep=2)
    assert apart(shared, whole) < made.near


def test_packed_rows_have_the_losses_and_gradients_of_rows_alone(made: Made) -> None:
    """Rows of a sequence are kept apart by a mask; the adapter's gradient sees what the loss sees."""
    read = [list(range(20, 45)), [7, 8, 9, 10], list(range(50, 61)), [5, 6]]
    said = [[70, 71, 72], [73], [74, 75], [76]]
    packed = pack(read, said, room=40, pad=3, normaliser=1.0)
    assert packed.positions is not None
    assert packed.columns is not None
    assert 1 < len(packed.tokens) < len(read)
    trained = [p for p in made.model.parameters() if p.requires_grad]
    tokens, positions, columns, answers = (
        t.to(made.device) for t in (packed.tokens, packed.positions, packed.columns, packed.answers)
    )
    with made.computing():
        require_rows_apart(made.model, "sdpa")
        logits = packed_logits(made.model, tokens, positions, columns, "sdpa")
        together = F.cross_entropy(
            logits.flatten(0, 1), answers.flatten(), ignore_index=NO_LOSS, reduction="sum"
        )
        each = []
        for ids, wanted in zip(read, said, strict=True):
            row = alone(made, ids)[-len(wanted) :][None]
            losses = answer_losses(row, torch.tensor([wanted], device=made.device))
            each.append(losses[0] * len(wanted))
        apiece = torch.stack(each).sum()
    assert float(together) == pytest.approx(float(apiece), rel=made.near)
    found, expected = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
        for loss in (together, apiece)
    )
    assert found.dtype == torch.float32
    assert expected.norm() > 0
    assert apart(found, expected) < 2 * made.near


@torch.no_grad()
def test_a_merged_export_computes_what_was_evaluated(
    made: Made, tiny: Path, tmp_path: Path
) -> None:
    """By plain transformers, in the type it was written in; merging rounds the sum of two weights again."""
    rows = batch(PROMPTS, made.device)
    with made.computing():
        expected = last_logits(made.model, *rows)[:, 0]
    tokenizer = load_tokenizer(made.spec)
    written = export_model(made.model, tokenizer, AdapterSpec(rank=8), tmp_path / "export")
    assert set(written) == {"adapter", "merged"}
    plain = AutoModelForCausalLM.from_pretrained(written["merged"]).to(made.device).eval()
    assert plain.dtype == getattr(torch, made.spec.dtype)
    assert getattr(plain.config, "quantization_config", None) is None
    base = load_causal_lm(
        BackboneSpec(str(tiny), dtype="float32", chat_template=False, max_length=LONGEST),
        torch.device(made.device),
    )
    merged, untrained = (last_logits(model, *rows)[:, 0] for model in (plain, base))
    assert apart(merged, expected) < made.near
    assert apart(untrained, expected) > 10 * made.near
