"""Text similarity against cosines written out, and what it does with items and histories without text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from datamodules.types import CATALOG_SCHEMA, TEST, TRAIN, Batch, Histories, Rows
from lightning_modules.item_text_similarity import ItemTextSimilarityModule
from lightning_modules.item_text_similarity.model import centred, mean_text
from lightning_modules.item_texts import item_texts
from lightning_modules.llm import SentenceEncoderSpec, encode_texts
from tests.lightning_modules.tiny_bert import LONGEST, write_tiny_bert

EVERY = torch.arange(1, 6)
TITLES = ["jaws", "alien", None, "amelie", "the shining"]
CATEGORIES = [["horror", "sea"], ["horror"], None, [], ["horror", "snow"]]
CATALOG = pl.DataFrame(
    {
        "item_id": list("abcde"), "title": TITLES, "description": ["a shark", "", " ", None, "an hotel"],
        "categories": CATEGORIES, "brand": [None] * 5, "price": [None] * 5, "images": [None] * 5,
    },
    schema=CATALOG_SCHEMA,
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoderSpec:
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    return SentenceEncoderSpec(str(folder), max_length=LONGEST)


def _ready(encoder: SentenceEncoderSpec, **options: Any) -> ItemTextSimilarityModule:
    module = ItemTextSimilarityModule(CATALOG, encoder, **options)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    module.setup("test")
    return module


def _batch(*histories: list[int]) -> Batch:
    rows, width = torch.arange(len(histories)), max(1, *map(len, histories))
    grid = torch.tensor([h + [0] * (width - len(h)) for h in histories])
    return Batch(rows, rows + 1, grid, (grid > 0).sum(1))


def _histories() -> Histories:
    return Histories(
        np.array([0, 0, 4]), np.array([1, 2, 4, 5], np.int32),
        np.array([TRAIN] * 3 + [TEST], np.int8), np.zeros(4, np.int64), 5,
    )  # fmt: skip


# ---------------------------------------------------------------- texts


def test_a_text_is_the_fields_that_an_item_has() -> None:
    assert item_texts(CATALOG, ["title"]) == ["jaws", "alien", "", "amelie", "the shining"]
    assert item_texts(CATALOG, ["title", "categories", "description", "brand"]) == [
        "jaws. horror, sea. a shark", "alien. horror", "", "amelie", "the shining. horror, snow. an hotel",
    ]  # fmt: skip
    assert item_texts(CATALOG, ["categories", "title"])[0] == "horror, sea. jaws"
    assert item_texts(CATALOG, ["brand"]) == [""] * 5


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("recency", [1.0, 0.5])
def test_a_history_is_the_weighted_mean_of_its_texts(recency: float) -> None:
    vectors = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    vectors[0] = vectors[3] = 0  # padding, and an item without text
    batch = _batch([1, 2, 3, 4], [5], [6, 6, 1], [3, 3], [])
    told = (vectors != 0).any(1)
    found = mean_text(batch.history, batch.length, vectors, told, recency)
    for row, history in enumerate(([1, 2, 3, 4], [5], [6, 6, 1], [3, 3], [])):
        total, weights = np.zeros(4), 0.0
        for back, item in enumerate(reversed(history)):
            if item != 3:
                total += recency**back * vectors[item].numpy()
                weights += recency**back
        np.testing.assert_allclose(found[row], total / weights if weights else total, atol=1e-6)


def test_centring_takes_out_the_mean_of_items_with_text() -> None:
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)) + 3
    vectors[0] = vectors[2] = 0
    kept = vectors[[1, 3, 4, 5]].numpy()
    expected = kept - kept.mean(0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = centred(vectors)
    np.testing.assert_allclose(found[[1, 3, 4, 5]], expected, atol=1e-6)
    assert not found[[0, 2]].any()
    same = torch.full((4, 3), 1 / 3**0.5)  # nothing tells the items apart, rounding least of all
    assert not centred(same).any()
    assert not centred(torch.zeros(3, 2)).any()


# ---------------------------------------------------------------- the row


def test_a_score_is_the_mean_cosine_with_the_history(encoder: SentenceEncoderSpec) -> None:
    module = _ready(encoder, fields=("title",))
    texts = encode_texts(encoder, [t or "" for t in TITLES])  # (5, d) of length 1
    batch = _batch([1, 2, 5], [4], [2, 3])
    state = module.encode(batch)
    scores = module.score(state, EVERY)
    cosines = texts @ texts.T
    expected = np.stack([cosines[[0, 1, 4]].mean(0), cosines[3], cosines[1]])
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    lists = torch.tensor([[5, 2], [1, 1], [4, 3]])
    torch.testing.assert_close(module.score(state, lists), scores.gather(1, lists - 1))
    torch.testing.assert_close(
        module.user_vectors(batch) @ module.item_vectors()[1:].T, scores
    )  # fits methods that take a dot-product model
    assert module.item_vectors().shape == (6, texts.shape[1])
    assert not list(module.state_dict())  # rebuilt, never kept in a checkpoint


@pytest.mark.parametrize("centre", [False, True])
def test_items_and_histories_without_text(encoder: SentenceEncoderSpec, centre: bool) -> None:
    module = _ready(encoder, centre=centre)
    state = module.encode(_batch([1, 2], [], [3], [3, 1], [1]))
    scores = module.score(state, EVERY)
    assert not scores[:, 2].any()  # nothing is known of item 3
    assert not scores[1:3].any()  # an empty history, and one of item 3 alone, tie all
    assert bool((scores[0, [0, 1, 3, 4]] != 0).all())
    torch.testing.assert_close(scores[3], scores[4])  # item 3 says nothing in a history
    wide = module.encode(_batch([1, 2], [5, 4, 2, 1, 1, 1]))
    torch.testing.assert_close(wide[:1], state[:1])


def test_fields_recency_and_centring_matter(encoder: SentenceEncoderSpec) -> None:
    batch = _batch([1, 2, 5])
    rows = [
        _ready(encoder, **options)
        for options in ({}, {"fields": ("title",)}, {"recency": 0.5}, {"centre": True})
    ]
    scores = [tuple(m.score(m.encode(batch), EVERY)[0].tolist()) for m in rows]
    assert len(set(scores)) == 4
    again = _ready(encoder)
    assert tuple(again.score(again.encode(batch), EVERY)[0].tolist()) == scores[0]


def test_the_newest_events_are_read(encoder: SentenceEncoderSpec) -> None:
    one = np.array([1])
    rows = Rows(_histories(), one - 1, one, one - 1, one * 3, 0, 0)
    batch = _ready(encoder, max_length=2).collator(training=False)(rows)
    assert batch.history.tolist() == [[2, 4]]


def test_data_without_text_and_impossible_settings_are_refused(
    encoder: SentenceEncoderSpec,
) -> None:
    histories = _histories()
    assert ItemTextSimilarityModule(CATALOG, encoder).impossible(histories) is None
    nothing = ItemTextSimilarityModule(CATALOG, encoder, fields=("brand",))
    assert nothing.impossible(histories) == "no item has a brand"
    with pytest.raises(ValueError, match="at least one field"):
        ItemTextSimilarityModule(CATALOG, encoder, fields=())
    with pytest.raises(ValueError, match="each once"):
        ItemTextSimilarityModule(CATALOG, encoder, fields=("title", "title"))
    for recency in (0.0, 1.5):
        with pytest.raises(ValueError, match="recency must be above 0"):
            ItemTextSimilarityModule(CATALOG, encoder, recency=recency)
