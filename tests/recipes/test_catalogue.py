"""A whole catalogue ranked by way of a shortlist, tiny, through the real command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

NAME = "mllm_msr/toy_shop_catalogue"
PRODUCTS, SHOPPERS, LISTED = 30, 20, 5
WRITERS = ("item_pictures", "item_fusion", "user_summaries")
TINY = [
    "llm=tiny_random_vision", f"data.products={PRODUCTS}", f"data.shoppers={SHOPPERS}",
    "data.candidates.count=8", "launch.threads=1", "launch.accelerator=cpu", "beside=[]",
    *(f"~stages.{name}" for name in ("evaluate_sasrec", "evaluate")),
    *(f"stages.{name}.module.max_new_tokens=6" for name in WRITERS),
    "stages.sasrec.trainer.max_epochs=1", "stages.align_vision.trainer.max_epochs=1",
    "stages.align_vision.data.train=16", "stages.align_vision.data.valid=16",
    "stages.sft.trainer.max_epochs=1", "stages.sft.module.learning_rate=0.005",
    f"stages.evaluate_catalogue.module.shortlist_items={LISTED}",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(finish: Callable[..., Any]) -> Any:
    return finish(NAME, TINY)


def test_a_language_model_orders_what_another_method_retrieved(finished: Any) -> None:
    tables = {}
    for stage in ("retrieve", "evaluate_catalogue"):
        (file,) = finished.folder(stage).glob("scores.*.parquet")
        tables[stage] = pl.read_parquet(file).sort("row")
    first, second = tables.values()
    assert second.height == SHOPPERS * 0.4
    # Seven purchases, of which six are not asked about again.
    assert set(second["candidates"]) == set(first["candidates"]) == {PRODUCTS - 6}
    lists = first["top_items"].list.head(LISTED)
    assert [sorted(a) for a in second["top_items"]] == [sorted(a) for a in lists]
    assert second["top_items"].to_list() != lists.to_list()  # another order, for at least one row
    listed = first["target_id"].is_in(lists)  # row by row
    assert 0 < listed.sum() < len(listed)
    moved = second.filter(~listed)
    assert (moved["above"] >= LISTED).all()
    assert moved["above"].to_list() == first.filter(~listed)["above"].to_list()
    for items, target, above in second.filter(listed)[
        "top_items", "target_id", "above"
    ].iter_rows():
        assert items.index(target) >= above
    assert (second.filter(listed)["above"] < LISTED).all()


def test_how_many_targets_could_be_found_is_told(finished: Any) -> None:
    (file,) = finished.folder("retrieve").glob("scores.*.parquet")
    first = pl.read_parquet(file)
    found = first["target_id"].is_in(first["top_items"].list.head(LISTED)).sum()
    told = (
        f"{found} of {first.height} targets are among the {LISTED} items of their rows' shortlists"
    )
    assert told in finished.result.stderr
