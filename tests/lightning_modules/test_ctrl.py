"""CTRL: its contrast by hand, texts of prefixes one by one, and what the second stage goes on with."""

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

from datamodules.types import Batch
from lightning_modules.ctrl import CTRLAlignmentModule, CTRLModule
from lightning_modules.ctrl.model import Alignment, contrast, similarities
from lightning_modules.llm import SentenceEncoderSpec, encode_texts
from lightning_modules.sasrec import SASRecModule
from tests.lightning_modules.reloading import require_same_scores
from tests.lightning_modules.tiny_bert import LONGEST, WIDTH, write_tiny_bert

ITEMS = 6
CATALOG = pl.DataFrame(
    {
        "title": ["jaws", "alien", None, "amelie", "the shining", "up"],
        "description": ["a shark", None, "", None, "a hotel", None],
    },
    schema={"title": pl.String, "description": pl.String},
)
TEXTS = ["jaws. a shark", "alien", "", "amelie", "the shining. a hotel", "up"]
HISTORY = torch.tensor(
    [[1, 2, 3, 4], [5, 6, 0, 0], [3, 0, 0, 0], [2, 5, 1, 0]]
)  # item 3 has no text
LENGTH = torch.tensor([4, 2, 1, 3])
TARGETS = torch.tensor([[0, 0, 0, 5], [0, 4, 0, 0], [1, 0, 0, 0], [0, 0, 6, 0]])
SIZES: dict[str, Any] = {"max_length": 4, "hidden_size": 8, "num_heads": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoderSpec:
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    return SentenceEncoderSpec(str(folder), max_length=LONGEST)


def attached(module: Any) -> Any:
    """As a trainer of one CPU would."""
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), precision="32-true", global_step=0,
        datamodule=SimpleNamespace(seed=0), estimated_stepping_batches=10,
    )  # fmt: skip
    module.log = lambda *_, **__: None
    module.setup("fit")
    return module


def alignment(spec: SentenceEncoderSpec, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return attached(CTRLAlignmentModule(ITEMS, CATALOG, spec, **(SIZES | options)))


def second(seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    return attached(CTRLModule(ITEMS, **(SIZES | options)))


def batch(targets: Tensor = TARGETS) -> Batch:
    rows = torch.arange(len(HISTORY))
    return Batch(rows, rows + 1, HISTORY, LENGTH, targets=targets, normaliser=torch.tensor(4.0))


# ---------------------------------------------------------------- the contrast


def test_similarities_by_hand() -> None:
    a, b = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    found = similarities(a, b)
    for i in range(3):
        for j in range(3):
            expected = sum(max(float(a[i, m] @ b[j, n]) for n in range(2)) for m in range(2))
            assert found[i, j].item() == pytest.approx(expected, rel=1e-5)
    assert not torch.allclose(found, similarities(b, a).T)  # the directions differ


def test_the_contrast_by_hand() -> None:
    """Five rows in groups of two: the last group is one row, whose only pair is its own."""
    a, b = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    expected = 0.0
    for group in ([0, 1], [2, 3], [4]):
        for ours, theirs in ((a, b), (b, a)):
            for i in group:
                terms = []
                for j in group:
                    s = float((ours[i] @ theirs[j].T).max(1).values.sum())
                    p = 1 / (1 + np.exp(-s))
                    terms.append(-np.log(p if i == j else 1 - p))
                expected += float(np.mean(terms)) / 2
    assert contrast(a, b, 2).item() == pytest.approx(expected, rel=1e-4)


def test_sub_spaces_are_linear_maps_of_each_side() -> None:
    made = Alignment(4, 5, 3)
    user, text = torch.randn(2, 4), torch.randn(2, 5)
    first, other = made(user, text)
    assert first.shape == other.shape == (2, 3, 4)
    weight, bias = made.text_parts.weight[4:8], made.text_parts.bias[4:8]  # the second sub-space
    torch.testing.assert_close(other[:, 1], made.text(text) @ weight.T + bias)


def test_texts_of_prefixes_are_means_of_what_is_told(spec: SentenceEncoderSpec) -> None:
    """The loss, from each prefix's texts alone; a prefix without any (row 2) has no part in it."""
    module = alignment(spec)
    vectors = torch.from_numpy(encode_texts(spec, TEXTS))
    texts = torch.stack(
        [vectors[[i - 1 for i in ids]].mean(0) for ids in ([1, 2, 4], [5, 6], [2, 5, 1])]
    )
    plain = SASRecModule(ITEMS, **SIZES)
    plain.network.load_state_dict(module.network.state_dict())
    states = plain.user_vectors(batch())[[0, 1, 3]]
    expected = contrast(*module.alignment(states, texts), 32) / 4
    torch.testing.assert_close(module.training_step(batch(), 0), expected)
    without = TARGETS.clone()
    without[2] = 0  # a row that only keeps ranks in step
    torch.testing.assert_close(module.training_step(batch(without), 0), expected)
    without[1] = 0
    assert not torch.allclose(module.training_step(batch(without), 0), expected)


# ---------------------------------------------------------------- the two stages


def trained(module: Any, steps: int = 20) -> tuple[list[float], set[str], set[str]]:
    """Losses, and which parameters moved and which did not."""
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module.training_step(batch(), 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    return losses, moved, before.keys() - moved


def test_everything_but_the_texts_is_trained(spec: SentenceEncoderSpec) -> None:
    module = alignment(spec, learning_rate=0.01)
    table = module.texts.table.clone()
    losses, _, still = trained(module)
    assert losses[-1] < losses[0]
    assert not still
    assert torch.equal(module.texts.table, table)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert {n.split(".")[0] for n in checkpoint["state_dict"]} == {"network", "alignment"}


def test_the_second_stage_goes_on_with_the_aligned_network(
    spec: SentenceEncoderSpec, tmp_path: Path
) -> None:
    first = alignment(spec)
    trained(first, 3)
    file = tmp_path / "best.ckpt"
    torch.save({"state_dict": first.state_dict()}, file)
    module = second(start=str(file)).eval()
    with torch.no_grad():
        expected = first.eval().user_vectors(batch()) @ module.head.weight.T + module.head.bias
        torch.testing.assert_close(module.user_vectors(batch()), expected)
        assert torch.equal(module.item_vectors(), first.item_vectors())
    for other in ({"hidden_size": 6}, {"max_length": 5}, {"num_blocks": 1}):
        with pytest.raises(ValueError, match="is of another network"):
            second(start=str(file), **other)


def test_the_second_stages_loss_by_hand() -> None:
    module = second(learning_rate=0.01)
    states = module.network(HISTORY, LENGTH)[TARGETS > 0] @ module.head.weight.T + module.head.bias
    logits = states @ module.item_vectors()[1:].T
    expected = F.cross_entropy(logits, TARGETS[TARGETS > 0] - 1, reduction="sum") / 4
    torch.testing.assert_close(module.training_step(batch(), 0), expected)
    losses, _, still = trained(module)
    assert losses[-1] < losses[0]
    assert not still


def test_weights_round_trip_and_an_empty_history_ties_all(
    spec: SentenceEncoderSpec, tmp_path: Path
) -> None:
    with torch.no_grad():
        require_same_scores(second(1), second(2), batch(), ITEMS, tmp_path)
        nothing = torch.zeros(1, dtype=torch.long)
        empty = Batch(nothing, nothing + 1, nothing[:, None], nothing)
        assert not second().user_vectors(empty).any()
        a, b = alignment(spec, 0), alignment(spec, 3)
        require_same_scores(a, b, batch(), ITEMS, tmp_path)
    late = CTRLAlignmentModule(ITEMS, CATALOG, spec, **SIZES)
    late.load_weights(tmp_path / "best.ckpt")  # before the sentence vectors are there
    attached(late)
    for name, value in a.state_dict().items():
        assert torch.equal(late.state_dict()[name], value), name


# ---------------------------------------------------------------- refusals


def test_a_batch_has_to_be_in_one_place(spec: SentenceEncoderSpec) -> None:
    module = alignment(spec)
    for world, parts in ((2, 1), (1, 2)):
        trainer: Any = SimpleNamespace(
            world_size=world, accumulate_grad_batches=parts, gradient_clip_val=None
        )
        assert "launch.devices=1" in module.untrainable(trainer)
    whole = SimpleNamespace(world_size=1, accumulate_grad_batches=1, gradient_clip_val=None)
    assert module.untrainable(whole) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [({"loss": "bce"}, "leave out loss"), ({"windows": "all"}, "leave out loss"),
     ({"subspaces": 0}, "subspaces"),
     ({"group_size": 1}, "group_size")],
)  # fmt: skip
def test_settings_that_cannot_be(
    spec: SentenceEncoderSpec, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        alignment(spec, **options)
    with pytest.raises(ValueError, match="6 items, expected 5"):
        CTRLAlignmentModule(ITEMS - 1, CATALOG, spec)


def test_data_without_text_is_refused(spec: SentenceEncoderSpec) -> None:
    nothing = CATALOG.with_columns(pl.lit(None, pl.String).alias("title"))
    module = CTRLAlignmentModule(ITEMS, nothing, spec, fields=("title",), **SIZES)
    assert module.impossible(None) == "no item has a title"  # type: ignore[arg-type]
    assert alignment(spec).impossible(None) is None
    assert alignment(spec).texts.table.shape == (ITEMS + 1, WIDTH)
