"""Feature bags and fused item vectors against small catalogues worked out by hand."""

from __future__ import annotations

import copy
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.types import CATALOG_SCHEMA
from lightning_modules.item_features import FusedEmbedding, ItemFeatures, feature_bags

# Items 1..5: two genres, the brand alone, one genre, nothing, an empty list.
GENRES = [["War", "Drama"], None, ["Drama"], None, []]
BRANDS = ["Drama", "Acme", "Acme", None, None]
BOTH = ("categories", "brand")
D = 4


def catalog(categories: list[Any] = GENRES, brands: list[Any] = BRANDS) -> pl.DataFrame:
    """A catalogue as the data module hands it over."""
    given = {"categories": categories, "brand": brands}
    columns = {name: given.get(name, [None] * len(brands)) for name in CATALOG_SCHEMA}
    return pl.DataFrame(columns, schema=CATALOG_SCHEMA)


def features(seed: int = 0, **settings: Any) -> ItemFeatures:
    torch.manual_seed(seed)
    return ItemFeatures(catalog(), D, **({"min_count": 1, "init_std": 1.0} | settings))


def fused(fusion: str = "concat", tie: str = "fused", seed: int = 0) -> FusedEmbedding:
    torch.manual_seed(seed)
    ids = nn.Embedding(6, D, padding_idx=0)
    return FusedEmbedding(ids, features(seed), fusion, tie)  # type: ignore[arg-type]


def naive_mean(of: ItemFeatures, ids: list[int]) -> Tensor:
    """The mean of the embeddings of feature ids, by a loop."""
    total = torch.zeros(D)
    for i in ids:
        total = total + of.embedding.weight[i] / len(ids)
    return total


def test_bags_of_a_small_catalogue() -> None:
    bags, vocabulary = feature_bags(catalog(), BOTH, min_count=1)
    assert vocabulary == [
        ("brand", "Acme"), ("brand", "Drama"), ("categories", "Drama"), ("categories", "War"),
    ]  # fmt: skip
    expected = [[0, 0, 0], [2, 3, 4], [1, 0, 0], [1, 3, 0], [0, 0, 0], [0, 0, 0]]
    assert bags.dtype == torch.int64
    assert bags.tolist() == expected


def test_rare_values_are_left_out() -> None:
    bags, vocabulary = feature_bags(catalog(), BOTH, min_count=2)
    assert vocabulary == [("brand", "Acme"), ("categories", "Drama")]
    assert bags.tolist() == [[0, 0], [2, 0], [1, 0], [1, 2], [0, 0], [0, 0]]


def test_a_value_counts_once_an_item_and_columns_may_be_chosen() -> None:
    twice = catalog([["War", "War"], ["Drama"], ["Drama"], None, None])
    bags, vocabulary = feature_bags(twice, ("categories",), min_count=2)
    assert vocabulary == [("categories", "Drama")]
    assert bags[:, 0].tolist() == [0, 0, 1, 1, 0, 0]
    assert feature_bags(catalog(), ("brand",), 1)[1] == [("brand", "Acme"), ("brand", "Drama")]


def test_bags_depend_neither_on_the_order_of_columns_nor_of_values() -> None:
    first = feature_bags(catalog(), BOTH, 1)
    turned = [None if g is None else g[::-1] for g in GENRES]
    second = feature_bags(catalog(turned), BOTH[::-1], 1)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


def test_feature_vectors_are_means() -> None:
    module = features()
    grid = torch.tensor([[1, 2, 3], [4, 5, 0]])
    with torch.no_grad():
        got = module(grid)  # (2, 3, d)
        assert got.shape == (2, 3, D)
        torch.testing.assert_close(got[0, 0], naive_mean(module, [2, 3, 4]))
        torch.testing.assert_close(got[0, 1], naive_mean(module, [1]))
        torch.testing.assert_close(got[0, 2], naive_mean(module, [1, 3]))
        assert not got[1].any()  # no features, an empty list, padding
    assert module(grid[:, :0]).shape == (2, 0, D)


def test_gradients_are_those_of_the_means() -> None:
    module = features()
    weights = torch.randn(3, D)
    (module(torch.tensor([1, 3, 4])) * weights).sum().backward()
    expected = torch.zeros(5, D)
    expected[[2, 3, 4]] += weights[0] / 3
    expected[[1, 3]] += weights[1] / 2
    torch.testing.assert_close(module.embedding.weight.grad, expected)


@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_fused_vectors(fusion: str) -> None:
    module = fused(fusion)
    items = torch.tensor([3, 4, 0])
    with torch.no_grad():
        ids, means = module.ids.weight[items], module.features(items)
        if module.linear is None:
            expected = ids + means
        else:
            w = module.linear.weight  # (d, 2d)
            expected = torch.stack(
                [w[:, :D] @ e + w[:, D:] @ f for e, f in zip(ids, means, strict=True)]
            )
        torch.testing.assert_close(module(items), expected)
        torch.testing.assert_close(module.table()[items], expected)
        assert not module.table()[0].any()


@pytest.mark.parametrize("tie", ["fused", "ids"])
def test_the_table_of_scores(tie: str) -> None:
    module = fused(tie=tie)
    assert torch.equal(module.weight, module.table() if tie == "fused" else module.ids.weight)
    assert not torch.equal(module.table(), module.ids.weight)


@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_a_kept_table_changes_neither_values_nor_gradients(fusion: str) -> None:
    items = torch.tensor([[1, 3, 3], [5, 0, 0]])
    gradients = []
    for keep in (False, True):
        module = fused(fusion)
        if keep:
            module.keep()
            assert module.weight is module.table()
        scores = torch.tanh(module(items)) @ module.weight.T
        scores.square().sum().backward()
        module.forget()
        assert module.table() is not module.table()
        gradients.append([scores.detach(), *(p.grad for p in module.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_building_twice_gives_the_same_and_bags_stay_out_of_checkpoints() -> None:
    first, second = fused(seed=3), fused(seed=3)
    state = first.state_dict()
    assert set(state) == {"ids.weight", "features.embedding.weight", "linear.weight"}
    for name, value in second.state_dict().items():
        assert torch.equal(value, state[name]), name
    copied = copy.deepcopy(first)
    assert torch.equal(copied.table(), first.table())


def test_features_can_tell_apart_what_ids_have_not_seen() -> None:
    """Items 1 and 3 share Drama: training item 1's score alone moves item 3's, too, but not item 5's."""
    module = fused("add")
    before = module.table().detach().clone()
    F.softplus(-module.table()[1] @ torch.ones(D)).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= parameter.grad
    moved = (module.table() - before).abs().sum(1) > 0
    assert moved.tolist() == [False, True, False, True, False, False]


def test_data_without_features_is_refused() -> None:
    empty = catalog([None] * 5, [None] * 5)
    with pytest.raises(ValueError, match=r"no item features: of its 5 items.*categories or brand"):
        ItemFeatures(empty, D)
    with pytest.raises(ValueError, match="lower min_count=3"):
        features(min_count=3)


@pytest.mark.parametrize(
    "settings", [{"columns": ("title",)}, {"columns": ()}, {"min_count": 0}, {"columns": "brand"}]
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="columns must name some of categories, brand"):
        features(**settings)


def test_wrong_fusions_and_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="got fusion='sum', tie='none'"):
        fused("sum", "none")
    with pytest.raises(ValueError, match="catalogue has 5 items, but the model has 8"):
        FusedEmbedding(nn.Embedding(9, D), features(), "add", "ids")
