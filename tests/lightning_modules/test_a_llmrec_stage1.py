"""A-LLMRec's first stage: its losses by hand, its text encoder, what it learns from, what stays frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from datamodules.loading import AttachNegatives, TrainDataset, TrainRows
from datamodules.samplers import RowBatch
from datamodules.types import CATALOG_SCHEMA, TEST, TRAIN, VALID, Histories
from lightning_modules.a_llmrec import Stage1Module
from lightning_modules.a_llmrec.model import AutoEncoder, alignment_losses
from lightning_modules.bert4rec import BERT4RecModule
from lightning_modules.llm import SentenceEncoderSpec, encode_texts
from lightning_modules.llm.text_encoder import ItemTextEncoder
from lightning_modules.mf import BPRMFModule
from lightning_modules.popularity import PopularityModule
from lightning_modules.sasrec import SASRecModule
from tests.lightning_modules.tiny_bert import LONGEST, WIDTH, write_tiny_bert

TITLES = ["jaws", "alien", None, "amelie", "the shining", "up"]
CATALOG = pl.DataFrame(
    {
        "item_id": list("abcdef"), "title": TITLES, "description": ["a shark", "", " ", None, "a hotel", "x"],
        "categories": [None] * 6, "brand": [None] * 6, "price": [None] * 6, "images": [None] * 6,
    },
    schema=CATALOG_SCHEMA,
)  # fmt: skip
TEXTS = ["jaws. a shark", "alien", "", "amelie", "the shining. a hotel", "up. x"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoderSpec:
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    return SentenceEncoderSpec(str(folder), max_length=LONGEST)


def histories(newest: int = 4) -> Histories:
    """Two users; the first's newest training event is ``newest``."""
    items = np.array([1, 2, 3, newest, 5, 6, 4, 2, 5, 1], np.int32)
    split = np.array([TRAIN] * 4 + [VALID, TEST] + [TRAIN] * 2 + [VALID, TEST], np.int8)
    return Histories(np.array([0, 0, 6, 10]), items, split, np.arange(10), 6)


# ---------------------------------------------------------------- losses


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_losses_by_hand() -> None:
    torch.manual_seed(0)
    items, texts = AutoEncoder(3, 2).double(), AutoEncoder(4, 2).double()
    user, item, text = (torch.randn(5, n, dtype=torch.float64) for n in (3, 3, 4))
    told = torch.tensor([True, True, False, True, False])
    label = torch.tensor([1.0, 0, 1, 0, 0], dtype=torch.float64)
    w = {n: p.detach().numpy() for m in (items, texts) for n, p in
         ((f"{m is texts}.{n}", p) for n, p in m.named_parameters())}  # fmt: skip
    u, e, q = (x.numpy() for x in (user, item, text))
    latent = sigmoid(e @ w["False.down.weight"].T + w["False.down.bias"])
    rebuilt = latent @ w["False.up.weight"].T + w["False.up.bias"]
    latent_q = sigmoid(q @ w["True.down.weight"].T + w["True.down.bias"])
    rebuilt_q = latent_q @ w["True.up.weight"].T + w["True.up.bias"]
    y, t = label.numpy(), told.numpy()
    for scores, divisor in (("dot", 1), ("mean", 3)):
        s = sigmoid((u * rebuilt).sum(1) / divisor)
        found = alignment_losses(items, texts, user, item, text, told, label, scores)  # type: ignore[arg-type]
        assert found.matching.item() == pytest.approx(((latent - latent_q) ** 2).mean(1)[t].sum())
        assert found.item.item() == pytest.approx(((rebuilt - e) ** 2).mean(1).sum())
        assert found.text.item() == pytest.approx(((rebuilt_q - q) ** 2).mean(1)[t].sum())
        expected = -(y * np.log(s) + (1 - y) * np.log(1 - s)).sum()
        assert found.recommendation.item() == pytest.approx(expected)


def test_a_text_is_not_pulled_to_its_own_reconstruction() -> None:
    items, texts = AutoEncoder(3, 2), AutoEncoder(3, 2)
    vectors = torch.randn(4, 3, requires_grad=True)
    told, label = torch.ones(4, dtype=torch.bool), torch.ones(4)
    for p in texts.down.parameters():  # no way back through the encoder
        p.data.zero_()
    found = alignment_losses(
        items, texts, torch.randn(4, 3), torch.randn(4, 3), vectors, told, label
    )
    (gradient,) = torch.autograd.grad(found.text, vectors)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("sizes", [(0, 2), (3, 0)])
def test_an_autoencoder_has_a_size(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        AutoEncoder(*sizes)


# ---------------------------------------------------------------- texts


def test_trained_or_not_the_vectors_are_those_of_the_encoder(spec: SentenceEncoderSpec) -> None:
    expected = torch.from_numpy(encode_texts(spec, TEXTS))  # (6, t)
    assert expected[2].abs().sum() == 0
    for trained in ("none", "last_layer", "all"):
        encoder = ItemTextEncoder(spec, TEXTS, trained, chunk_size=2)  # type: ignore[arg-type]
        assert encoder.load(torch.device("cpu")) == WIDTH
        found = encoder.all_vectors()
        torch.testing.assert_close(found[1:], expected)
        assert found[0].abs().sum() == 0
        torch.testing.assert_close(encoder.eval()(torch.tensor([6, 3, 1])), expected[[5, 2, 0]])


@pytest.mark.parametrize("trained", ["last_layer", "all"])
def test_chunks_change_neither_vectors_nor_gradients(
    spec: SentenceEncoderSpec, trained: Any
) -> None:
    items, weight = torch.tensor([6, 2, 5, 3, 1]), torch.randn(5, WIDTH)
    gradients = []
    for size in (64, 2):
        encoder = ItemTextEncoder(spec, TEXTS, trained, chunk_size=size)
        encoder.load(torch.device("cpu"))
        (encoder.eval()(items) * weight).sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
    layers = {name.split("layer.")[1][0] for name in gradients[0] if "layer." in name}
    assert layers == ({"0", "1"} if trained == "all" else {"1"})


@pytest.mark.parametrize(
    ("option", "words"), [({"trained": "some"}, "not one of"), ({"chunk_size": 0}, "1")]
)
def test_an_encoder_refuses_what_it_cannot_do(
    spec: SentenceEncoderSpec, option: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ItemTextEncoder(spec, TEXTS, **option)


# ---------------------------------------------------------------- the module


def backbone(folder: Path, kind: Any = SASRecModule, **options: Any) -> Any:
    """A module with the weights of its checkpoint, and the checkpoint."""
    torch.manual_seed(1)
    made = kind(num_items=6, hidden_size=8, max_length=5, **options)
    file = folder / "backbone.ckpt"
    torch.save({"state_dict": made.state_dict()}, file)
    return made, str(file)


def stage1(
    folder: Path, spec: SentenceEncoderSpec, base: Any = None, **options: Any
) -> Stage1Module:
    made, file = base or backbone(folder)
    module = Stage1Module(CATALOG, made, file, spec, latent_size=4, **options)
    data = SimpleNamespace(seed=0, histories=histories())
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(strategy=strategy, datamodule=data)  # type: ignore[assignment]
    module.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    module.configure_model()
    return module


def batch_of(module: Stage1Module, held: Histories) -> Any:
    rows = TrainRows(held, module.max_length, module.all_windows, True, module.newest_target)
    collate = AttachNegatives(module.collator(training=True), 1)
    normaliser = float(rows.target_counts.sum())
    return collate(
        replace(TrainDataset(rows, 0)[RowBatch.every(len(rows.user))], normaliser=normaliser)
    )


def test_the_newest_event_is_learned_and_the_user_has_not_met_it(
    tmp_path: Path, spec: SentenceEncoderSpec
) -> None:
    module = stage1(tmp_path, spec)
    first = batch_of(module, histories(newest=4))
    assert first.history.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert first.targets.tolist() == [[0, 0, 4], [2, 0, 0]]
    assert first.normaliser == 2
    other = batch_of(module, histories(newest=6))
    assert other.targets.tolist() == [[0, 0, 6], [2, 0, 0]]
    with torch.no_grad():
        vectors = [module.backbone.user_vectors(b) for b in (first, other)]
    torch.testing.assert_close(vectors[0], vectors[1], atol=0, rtol=0)


def test_all_positions_are_those_of_the_backbone(tmp_path: Path, spec: SentenceEncoderSpec) -> None:
    module = stage1(tmp_path, spec, positions="all")
    batch = batch_of(module, histories())
    assert batch.targets.tolist() == [[2, 3, 4], [2, 0, 0]]
    assert batch.normaliser == 4


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("trained", ["all", "last_layer", "none"])
def test_what_is_trained_moves_and_what_is_frozen_does_not(
    tmp_path: Path, spec: SentenceEncoderSpec, positions: Any, trained: Any
) -> None:
    module = stage1(
        tmp_path, spec, positions=positions, encoder_trained=trained, learning_rate=0.01
    )
    module.train()
    assert not any(m.training for m in module.backbone.modules())
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = module.configure_optimizers()
    batch = batch_of(module, histories())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.8
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
    moved = {n.split(".")[0] for n, p in module.named_parameters() if p.requires_grad}
    assert moved == {"item_coder", "text_coder", *(["encoder"] if trained != "none" else [])}


def test_a_loss_of_weight_0_is_left_out(tmp_path: Path, spec: SentenceEncoderSpec) -> None:
    """Without matching and recommendation nothing ties the two sides: each rebuilds its own."""
    module = stage1(tmp_path, spec, matching=0.0, recommendation=0.0, text_reconstruction=0.0)
    module.training_step(batch_of(module, histories()), 0).backward()
    assert module.text_coder is not None
    assert module.item_coder is not None
    grads = [p.grad for p in module.text_coder.parameters()]
    assert all(g is None or g.abs().max() == 0 for g in grads)
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for p in module.item_coder.parameters()
    )


def test_scores_are_products_with_what_is_rebuilt(
    tmp_path: Path, spec: SentenceEncoderSpec
) -> None:
    module: Any = stage1(tmp_path, spec).eval()
    state = torch.randn(2, 8)
    table = module.backbone.item_vectors().detach()
    for joint, vectors in (
        ("item", torch.sigmoid(module.item_coder.down(table))),
        ("text", torch.sigmoid(module.text_coder.down(module.encoder.all_vectors()))),
    ):
        module.joint = joint
        rebuilt = module.item_coder.up(vectors)
        found = module.score(state, torch.tensor([1, 4, 6]))
        torch.testing.assert_close(found, state @ rebuilt[[1, 4, 6]].T)
        joint_vectors = module.joint_vectors()
        assert joint_vectors[0].abs().sum() == 0
        assert (joint_vectors[3].abs().sum() == 0) == (joint == "text")  # item 3 has no text


def test_a_backbone_without_histories_can_be_used(
    tmp_path: Path, spec: SentenceEncoderSpec
) -> None:
    torch.manual_seed(1)
    made = BPRMFModule(num_items=6, num_users=2, hidden_size=8)
    file = tmp_path / "bpr.ckpt"
    torch.save({"state_dict": made.state_dict()}, file)
    module = stage1(tmp_path, spec, (made, str(file)))
    batch = batch_of(module, histories())
    assert batch.targets[batch.targets > 0].tolist() == [4, 2]
    assert torch.isfinite(module.training_step(batch, 0))


def test_backbones_that_cannot_be_used_are_refused(
    tmp_path: Path, spec: SentenceEncoderSpec
) -> None:
    with pytest.raises(ValueError, match="PopularityModule, which has no user and item vectors"):
        Stage1Module(CATALOG, PopularityModule(), "x", spec)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positions must be last"):
        stage1(tmp_path, spec, backbone(tmp_path, BERT4RecModule), positions="all")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"positions": "first"}, "last, all"), ({"scores": "cosine"}, "dot, mean"),
     ({"joint": "x"}, "item, text"),
     ({"matching": -1.0}, "0 or more"),
     ({"matching": 0, "item_reconstruction": 0, "text_reconstruction": 0, "recommendation": 0}, "not all")],
)  # fmt: skip
def test_settings_that_cannot_be(
    tmp_path: Path, spec: SentenceEncoderSpec, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        stage1(tmp_path, spec, **options)
