"""Real posters: the subsample of films that ships as a data config, and posters with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from datamodules.captioned_items import CaptionedItems
from datamodules.movielens import MovieLensDataModule
from datamodules.types import TEST, TRAIN, VALID
from experiments import build, config

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "movielens"
TAR = DATA / "posters" / "posters_ml1m.tar"
pytestmark = pytest.mark.skipif(not TAR.is_file(), reason=f"needs {TAR}")


@pytest.fixture
def films(tmp_path: Path) -> Any:
    words = [f"data.root={DATA / 'ml-latest-small'}", f"data.images={TAR}", "data.on_bad_row=skip"]
    experiment = config.composed("data/movielens_posters", words)
    return build.build({**experiment.config["data"], "cache": str(tmp_path)})


def test_nearly_every_film_of_the_subsample_has_a_poster(films: Any) -> None:
    assert films.num_users == 200
    assert set(np.diff(films.histories.offsets)[1:]) == {7}
    rows = films.rows(TEST)
    assert rows.candidates.shape == (80, 21)
    mask = films.item_images.mask
    assert mask[1:].mean() > 0.95
    assert mask[films.histories.items].mean() > 0.98
    raw = films.catalog["item_id"].to_list()
    assert films.titles[raw.index("6") + 1] == "Heat (1995)"
    assert films.item_images.picture(raw.index("6") + 1).width == 200
    # Every film was rated 20 times by then: who asks for a popular one learns little.
    counts = films.histories.train_counts()[rows.candidates]
    is_target = rows.candidates == rows.target[:, None]
    of_target = counts[is_target][:, None]
    auc = ((counts < of_target) + 0.5 * (counts == of_target))[~is_target].mean()
    assert 0.4 < auc < 0.65


def test_posters_of_ml_1m_have_titles_and_genres(tmp_path: Path) -> None:
    part = MovieLensDataModule(
        "1m-sasrec", root=str(DATA / "ml-1m"), images=str(TAR), cache=str(tmp_path)
    )
    data = CaptionedItems({"films": part}, cache=str(tmp_path))
    learned, held_out = data.captioned(TRAIN), data.captioned(VALID)
    assert len(learned) + len(held_out) == 2_291
    assert len(held_out) == pytest.approx(0.15 * 2_291, abs=2)
    captions = [row.caption for row in (*learned, *held_out)]
    assert "Toy Story (1995) (Animation, Children's, Comedy)" in captions
    (item,) = part.catalog.with_row_index("i").filter(pl.col("title") == "Toy Story (1995)")["i"]
    row = captions.index("Toy Story (1995) (Animation, Children's, Comedy)")
    shown = (*learned, *held_out)[row].picture
    assert shown.tobytes() == part.item_images.picture(item + 1).tobytes()
