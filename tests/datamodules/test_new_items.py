"""Items that nobody has seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import DataFormatError
from datamodules.movielens import MovieLensDataModule
from datamodules.new_items import add_items, read_items


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_they_stand_behind_the_catalogue(tiny_movielens: Path, tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / "red.png")
    file = write(
        tmp_path / "new.jsonl",
        {"item_id": "n1", "title": "A", "categories": ["Drama"], "price": 3, "image": "red.png"},
        {"item_id": "n2", "title": "B", "description": None},
    )
    data = MovieLensDataModule(root=str(tiny_movielens))
    before = (data.num_items, data.prepared.digest)
    add_items(data, *read_items(file))
    assert data.num_items == before[0] + 2 == len(data.catalog)
    assert data.prepared.digest != before[1]
    assert data.raw_items(np.array([before[0] + 1])).to_list() == ["n1"]
    assert data.titles[-2:] == ["A", "B"]
    assert data.catalog["categories"].to_list()[-2:] == [["Drama"], None]
    assert data.item_images.mask.tolist() == [False] * (before[0] + 1) + [True, False]
    assert data.item_images.picture(before[0] + 1).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("lines", "words"),
    [(["{"], "line 1 is no JSON"), ([{"item_id": "a"}], "with item_id and title"),
     ([{"item_id": "a", "title": "t", "pickle": "x"}], "none but"), ([], "has 0 items"),
     ([{"item_id": 7, "title": "t"}], "item_id is empty or of another type"),
     ([{"item_id": "a", "title": "t", "categories": "x"}], "categories is empty"),
     ([{"item_id": "a", "title": "t"}, {"item_id": "a", "title": "u"}], "two items of the id 'a'"),
     (["", {"item_id": "a", "title": "x\ud800"}], "line 2: title holds half of a surrogate pair"),
     (['{"item_id": "\\udfff", "title": "t", "categories": ["\\ud83d"]}'], "item_id, categories holds"),
     ([{"item_id": "a", "title": "t", "image": "../secret.png"}], "no file beside")],
)  # fmt: skip
def test_what_is_no_item_is_told(lines: list[object], words: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataFormatError, match=words):
        read_items(write(tmp_path / "in" / "new.jsonl", *lines))


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    items, _ = read_items(
        write(tmp_path / "new.jsonl", '{"item_id": "a", "title": "\\ud83d\\ude00"}')
    )
    assert items["title"].to_list() == ["\U0001f600"]


def test_an_id_of_the_catalogue_is_refused(tiny_movielens: Path, tmp_path: Path) -> None:
    data = MovieLensDataModule(root=str(tiny_movielens))
    items = read_items(write(tmp_path / "new.jsonl", {"item_id": "7", "title": "t"}))
    with pytest.raises(DataFormatError, match="has an item '7' already"):
        add_items(data, *items)
