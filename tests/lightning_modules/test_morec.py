"""MoRec: SASRec on texts. Its vectors one text at a time, its losses by hand, what moves and what stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch, Histories
from lightning_modules.a_llmrec import Stage1Module
from lightning_modules.llm import SentenceEncoderSpec
from lightning_modules.llm.backbones import load_sentence_encoder
from lightning_modules.morec import MoRecModule
from lightning_modules.sasrec import SASRecModule
from tests.lightning_modules.reloading import require_same_scores
from tests.lightning_modules.tiny_bert import LONGEST, WIDTH, write_tiny_bert

ITEMS = 6
CATALOG = pl.DataFrame(
    {
        "title": ["jaws", "alien", None, "amelie", "the shining", " "],
        "description": ["a shark", None, "", None, "a hotel", None],
    },
    schema={"title": pl.String, "description": pl.String},
)
TEXTS = ["jaws. a shark", "alien", "", "amelie", "the shining. a hotel", ""]  # 3 and 6 have none
HISTORY = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
LENGTH = torch.tensor([4, 2, 0])
TARGETS = torch.tensor([[2, 3, 0, 5], [0, 4, 0, 0], [0, 0, 0, 0]])


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoderSpec:
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    return SentenceEncoderSpec(str(folder), max_length=LONGEST)


def attached(module: Any, counts: tuple[int, ...] = (1, 1, 1, 1, 1, 1)) -> Any:
    """As a trainer of one CPU would; ``counts``: training events of each item."""
    items = np.repeat(np.arange(1, ITEMS + 1), counts).astype(np.int32)
    offsets, split = np.array([0, 0, len(items)]), np.zeros(len(items), np.int8)
    histories = Histories(offsets, items, split, np.arange(len(items)), ITEMS)
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), global_step=3, precision="32-true",
        datamodule=SimpleNamespace(seed=0, histories=histories), estimated_stepping_batches=10,
    )  # fmt: skip
    module.log = lambda *_, **__: None
    module.setup("fit")
    return module


def built(spec: SentenceEncoderSpec, seed: int = 0, **options: Any) -> MoRecModule:
    torch.manual_seed(seed)
    settings = {"max_length": 4, "hidden_size": 8, "num_heads": 2, "dropout": 0.0}
    return MoRecModule(ITEMS, CATALOG, spec, **(settings | options))


def ready(spec: SentenceEncoderSpec, **options: Any) -> MoRecModule:
    """Set up, with biases that are not zero."""
    module: MoRecModule = attached(built(spec, **options))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1 and parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def batch(**extra: Any) -> Batch:
    rows = torch.arange(len(HISTORY))
    return Batch(
        rows, rows + 1, HISTORY, LENGTH, targets=TARGETS, normaliser=torch.tensor(4.0), **extra
    )


def one_at_a_time(module: MoRecModule, activation: str = "gelu") -> Tensor:
    """(I + 1, d): each text alone through tokenizer, encoder, mean, norm and projection."""
    encoder, linear = module.items.encoder, module.items.projection
    tokenizer, frozen = load_sentence_encoder(encoder.spec)
    model = frozen if encoder.model is None else encoder.model
    assert linear is not None
    rows = [torch.zeros(linear.out_features)]
    for text in TEXTS:
        vector = torch.zeros(WIDTH)
        if text:
            tokens = tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt")
            mean = model(**tokens).last_hidden_state[0].mean(0)
            vector = mean / mean.norm()
        made = linear.weight @ vector + linear.bias
        normal = torch.distributions.Normal(0.0, 1.0)
        rows.append(made * normal.cdf(made) if activation == "gelu" else made)
    return torch.stack(rows)


def as_sasrec(module: MoRecModule, table: Tensor) -> SASRecModule:
    """SASRec with these vectors as its own table: an independent way to the same states."""
    plain = SASRecModule(ITEMS, 4, hidden_size=8, num_heads=2, dropout=0.0)
    state = {k: v for k, v in module.state_dict().items() if ".item_embedding." not in k}
    plain.load_state_dict(state | {"network.item_embedding.weight": table.detach()})
    return plain.eval()


@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("trained", ["none", "last_layer", "all"])
def test_scores_are_those_of_sasrec_with_each_text_encoded_alone(
    spec: SentenceEncoderSpec, trained: Any, activation: Any
) -> None:
    module = ready(spec, encoder_trained=trained, activation=activation, chunk_size=2).eval()
    with torch.no_grad():
        table = one_at_a_time(module, activation)
        torch.testing.assert_close(module.item_vectors(), table)
        plain = as_sasrec(module, table)
        for kept in (False, True):
            if kept:  # as in an evaluation
                module.items.keep(module.items.table())
            users = module.user_vectors(batch())
            torch.testing.assert_close(users, plain.user_vectors(batch()), atol=1e-5, rtol=1e-4)
            assert not users[2].any()
            found = module.score(users, torch.tensor([3, 6, 1]))
            torch.testing.assert_close(
                found, users @ table[torch.tensor([3, 6, 1])].T, atol=1e-5, rtol=1e-4
            )


def test_items_without_text_share_the_projection_of_nothing(spec: SentenceEncoderSpec) -> None:
    module = ready(spec).eval()
    assert module.items.projection is not None
    with torch.no_grad():
        table = module.item_vectors()
        expected = F.gelu(module.items.projection.bias)
    assert expected.abs().min() > 0
    for item in (3, 6):
        torch.testing.assert_close(table[item], expected)
    assert not table[0].any()
    scores = module.score(module.user_vectors(batch()), torch.arange(1, ITEMS + 1))
    assert scores.isfinite().all()
    assert torch.equal(scores[:, 2], scores[:, 5])
    assert module.remarks() == ["2 of 6 items have no text and share one vector"]


@pytest.mark.parametrize("trained", ["none", "all"])
def test_full_softmax_by_hand(spec: SentenceEncoderSpec, trained: Any) -> None:
    module = ready(spec, encoder_trained=trained).eval()
    states = as_sasrec(module, one_at_a_time(module)).network(HISTORY, LENGTH)[TARGETS > 0]
    logits = states @ one_at_a_time(module)[1:].T
    expected = -logits.log_softmax(1)[torch.arange(4), TARGETS[TARGETS > 0] - 1].sum() / 4
    torch.testing.assert_close(module.training_step(batch(), 0), expected)


def test_the_debiased_pool_by_hand(spec: SentenceEncoderSpec) -> None:
    """A pool drawn by popularity, each with its logarithm taken off: what items' own counts say."""
    counts = (1, 2, 4, 8, 1, 4)  # of 20
    module = built(
        spec, encoder_trained="all", loss="sampled_ce", shared_negatives=True, popularity=1.0, negatives=5
    )  # fmt: skip
    attached(module, counts).eval()
    pool = module._negatives(batch(), TARGETS > 0)
    assert pool is not None
    table = one_at_a_time(module).detach()
    states = as_sasrec(module, table).network(HISTORY, LENGTH)[TARGETS > 0].detach()
    total = 0.0
    for state, target in zip(states, TARGETS[TARGETS > 0].tolist(), strict=True):
        positive = float(state @ table[target])
        kept = [j for j in pool.tolist() if j != target]
        mass = np.exp(positive) + sum(
            np.exp(float(state @ table[j])) / (5 * counts[j - 1] / 20) for j in kept
        )
        total += np.log(mass) - positive
    assert module.training_step(batch(), 0).item() == pytest.approx(total / 4, rel=1e-4)


@pytest.mark.parametrize("loss", ["ce", "bce", "sampled_ce"])
@pytest.mark.parametrize("trained", ["none", "last_layer", "all"])
def test_what_is_trained_moves_and_what_is_frozen_does_not(
    spec: SentenceEncoderSpec, trained: Any, loss: Any
) -> None:
    module = ready(spec, encoder_trained=trained, loss=loss, negatives=2, learning_rate=0.01,
                   encoder_learning_rate=0.01, weight_decay=0.1)  # fmt: skip
    module.train()
    before = {n: p.detach().clone() for n, p in module.state_dict().items()}
    table = module.items.encoder.table.clone() if trained == "none" else None
    scheduled = module.configure_optimizers()
    optimizer = scheduled["optimizer"]
    extra = {} if loss == "ce" else {"negatives": torch.randint(1, ITEMS + 1, (3, 4, 2))}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = module.training_step(batch(**extra), 0)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    moving = {n for n, p in module.named_parameters() if p.requires_grad}
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in moving), name
    assert table is None or torch.equal(module.items.encoder.table, table)
    texts = {n for n in moving if ".encoder." in n}
    assert bool(texts) == (trained != "none")
    assert any("layer.0" in n for n in texts) == (trained == "all")


def test_the_text_encoder_has_its_own_learning_rate(spec: SentenceEncoderSpec) -> None:
    module = ready(spec, encoder_trained="all", learning_rate=0.1, encoder_learning_rate=0.002,
                   weight_decay=0.3)  # fmt: skip
    groups = module.configure_optimizers()["optimizer"].param_groups
    found = {id(p): (g["initial_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert len(found) == len(trained) == sum(len(g["params"]) for g in groups)
    for name, p in trained.items():
        rate = 0.002 if ".encoder." in name else 0.1
        assert found[id(p)] == (rate, 0.3 if p.dim() > 1 else 0.0), name


def test_each_distinct_item_of_a_step_is_encoded_once(spec: SentenceEncoderSpec) -> None:
    module = ready(spec, encoder_trained="all", loss="bce")
    asked: list[list[int]] = []
    forward = module.items.encoder.forward
    module.items.encoder.forward = lambda items: (asked.append(items.tolist()), forward(items))[1]  # type: ignore[method-assign]
    negatives = torch.full((3, 4, 1), 1)
    module.training_step(batch(negatives=negatives), 0)
    assert asked == [[1, 2, 3, 4, 5, 6]]
    module.items._kept = None
    module.training_step(batch(negatives=negatives), 0)
    assert len(asked) == 2


def test_items_are_told_apart_in_mixed_precision(spec: SentenceEncoderSpec) -> None:
    module = ready(spec).eval()
    with torch.no_grad():
        expected = module.item_vectors()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module.item_vectors(), expected)


@pytest.mark.parametrize("trained", ["none", "last_layer"])
def test_weights_round_trip(spec: SentenceEncoderSpec, tmp_path: Path, trained: Any) -> None:
    first, second = (ready(spec, seed=s, encoder_trained=trained) for s in (0, 1))
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.1 * torch.randn_like(p) * p.requires_grad)
    with torch.no_grad():
        scores = require_same_scores(first, second, batch(), ITEMS, tmp_path)
    checkpoint: dict[str, Any] = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    saved = {n for n in checkpoint["state_dict"] if ".encoder." in n}
    assert all(".layer.1." in n for n in saved)
    assert bool(saved) == (trained == "last_layer")
    torch.save(checkpoint, tmp_path / "best.ckpt")
    late = built(spec, seed=2, encoder_trained=trained)
    late.load_weights(tmp_path / "best.ckpt")  # before there is an encoder, as the runner does
    attached(late).eval()
    with torch.no_grad():
        assert torch.equal(late.score(late.encode(batch()), torch.arange(1, ITEMS + 1)), scores)


def test_setting_up_leaves_the_random_stream_alone(spec: SentenceEncoderSpec) -> None:
    for trained in ("none", "all"):
        module = built(spec, encoder_trained=trained)
        torch.manual_seed(5)
        attached(module)
        assert torch.initial_seed() == 5
        drawn = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("trained", ["none", "all"])
def test_it_is_a_backbone_of_a_llmrec(
    spec: SentenceEncoderSpec, tmp_path: Path, trained: Any
) -> None:
    module = ready(spec, encoder_trained=trained).eval()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    file = tmp_path / "best.ckpt"
    torch.save(checkpoint, file)
    backbone = built(spec, seed=4, encoder_trained=trained)
    stage = Stage1Module(CATALOG, backbone, str(file), spec, latent_size=4, encoder_trained="none")
    attached(stage)
    stage.configure_model()
    assert {n.split(".")[0] for n, p in stage.named_parameters() if p.requires_grad} == {
        "item_coder", "text_coder",
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(stage.frozen_items(), module.item_vectors())
        torch.testing.assert_close(stage.encode(batch()), module.user_vectors(batch()))


def test_data_without_text_is_refused(spec: SentenceEncoderSpec) -> None:
    nothing = CATALOG.with_columns(pl.lit(None, pl.String).alias("title"))
    module = MoRecModule(ITEMS, nothing, spec, fields=("title",))
    assert module.impossible(None) == "no item has a title"  # type: ignore[arg-type]
    assert built(spec).impossible(None) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tied": False}, "no table of ids"), ({"table_optimizer": "rowwise_adagrad"}, "adamw"),
     ({"encoder_learning_rate": 0.0}, "above 0"), ({"activation": "relu"}, "gelu, none"),
     ({"encoder_trained": "some"}, "not one of")],
)  # fmt: skip
def test_settings_that_cannot_be(
    spec: SentenceEncoderSpec, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        built(spec, **options)
    with pytest.raises(ValueError, match="6 items, expected 5"):
        MoRecModule(ITEMS - 1, CATALOG, spec)
