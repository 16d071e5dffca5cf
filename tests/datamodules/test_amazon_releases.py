"""Names, addresses and places of the Amazon releases, and the data module on top."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from datamodules.amazon import AmazonDataModule
from datamodules.amazon_releases import RELEASES, categories, fetch_file, find_release
from datamodules.errors import DataSourceError
from tests.datamodules.amazon_files import (
    EVENTS,
    METADATA,
    REVIEWS,
    events_file,
    item,
    items_file,
    load,
    put,
)


@pytest.mark.parametrize(("year", "count"), [(2014, 24), (2018, 29), (2023, 34)])
def test_all_categories_are_there_by_name(year: int, count: int) -> None:
    names = categories(year)
    assert len(names) == len(set(names)) == count
    release = find_release(str(year))
    for name in names:
        assert release.category(name) == name
        assert release.category(name.replace("_", " ").upper()) == name
        assert release.category(name.replace("_and_", " & ").lower()) == name


@pytest.mark.parametrize(
    ("year", "given", "meant"),
    [
        (2014, "Arts, Crafts", "Amazon 2014 has no category"),
        (2018, "Beauty", "Did you mean .*'All_Beauty'"),
        (2023, "All_Beatuy", "Did you mean 'All_Beauty'"),
        (2018, "Baby", "Amazon 2018 has no category 'Baby'; it has AMAZON_FASHION, "),
        (2023, "", "Amazon 2023 has no category ''"),
    ],
)
def test_an_unknown_category_is_answered_with_the_nearest(
    year: int, given: str, meant: str
) -> None:
    with pytest.raises(ValueError, match=meant):
        find_release(year).category(given)


def test_punctuation_and_case_do_not_matter() -> None:
    assert find_release(2018).category("arts, crafts & sewing") == "Arts_Crafts_and_Sewing"
    assert find_release(2018).category("Amazon Fashion") == "AMAZON_FASHION"


@pytest.mark.parametrize("year", ["2019", "", "two", None, 2014.5])
def test_an_unknown_release_names_the_known_ones(year: object) -> None:
    with pytest.raises(ValueError, match="known are 2014, 2018 and 2023"):
        find_release(year)  # type: ignore[arg-type]


@pytest.mark.parametrize(("year", "kind"), sorted(REVIEWS))
def test_without_network_it_says_which_file_to_put_where(
    tmp_path: Path, year: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def no_network(url: str, path: Path, checksum: str | None = None) -> Path:
        asked.append((url, path))
        raise DataSourceError(f"{url}: could not be fetched (no network).")

    monkeypatch.setattr("datamodules.sources.download", no_network)
    category = METADATA[year].removeprefix("meta_").partition(".")[0]
    with pytest.raises(DataSourceError, match=r"pass data\.root=FOLDER") as error:
        fetch_file(RELEASES[year], kind, category, None, tmp_path)
    url, place = asked[-1]
    assert url.startswith("https://")
    assert place.name.removesuffix(".gz") == REVIEWS[year, kind]
    assert f"put {place.name}" in str(error.value)
    assert f"its address is {url}" in str(error.value)
    assert f"FOLDER/{category}" in str(error.value)


def test_all_missing_files_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataSourceError) as error:
        load(tmp_path, 2018, "5core")
    for name in ("All_Beauty_5.json.gz", "meta_All_Beauty.json.gz"):
        assert f"put {name}" in str(error.value)


def test_no_two_downloads_share_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: dict[Path, str] = {}

    def remember(url: str, path: Path, checksum: str | None = None) -> Path:
        assert places.setdefault(path, url) == url
        return path

    monkeypatch.setattr("datamodules.sources.download", remember)
    for release in RELEASES.values():
        for category in release.categories:
            for kind in (*release.reviews, "metadata"):
                fetch_file(release, kind, category, None, tmp_path)
    assert len(places) == len(set(places.values())) == (24 + 29 + 34) * 4


@pytest.mark.parametrize("below", ["", "All_Beauty", "5core"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_file_is_found_in_the_folder_or_in_that_of_its_category(
    tmp_path: Path, below: str, packed: bool
) -> None:
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    data = events_file(2018, "5core", EVENTS)
    file = folder / ("All_Beauty_5.json" + ".gz" * packed)
    file.write_bytes(gzip.compress(data) if packed else data)
    assert fetch_file(RELEASES[2018], "5core", "All_Beauty", tmp_path, tmp_path) == (
        file,
        str(tmp_path),
    )


def test_the_5_core_of_2023_is_never_taken_for_all_ratings(tmp_path: Path) -> None:
    for kind in ("5core", "ratings"):
        put(
            tmp_path / kind,
            2023,
            kind,
            events_file(2023, kind, EVENTS[: 2 if kind == "5core" else 3]),
        )
    for kind, count in (("5core", 2), ("ratings", 3)):
        assert load(tmp_path, 2023, kind, metadata=False).interactions.frame.height == count
    (tmp_path / "5core" / "All_Beauty.csv.gz").unlink()
    with pytest.raises(DataSourceError, match=r"has no All_Beauty\.csv"):
        load(tmp_path, 2023, "5core", metadata=False)


def test_a_missing_metadata_file_is_told_before_anything_is_parsed(tmp_path: Path) -> None:
    put(tmp_path, 2018, "5core", b"this would be a format error")
    with pytest.raises(DataSourceError, match=r"put meta_All_Beauty\.json\.gz.*metadata=false"):
        load(tmp_path, 2018, "5core")


def test_the_data_module_prepares_a_category(tmp_path: Path) -> None:
    users = [f"A{n}" for n in range(6)]
    events = [(u, f"B{n}", float(n % 5 + 1), 10**9 + n) for u in users for n in range(5)]
    items = [item(2023, f"B{n}", title=f"Item {n}") for n in range(5)]
    put(tmp_path / "raw", 2023, "full", events_file(2023, "full", events), items_file(2023, items))
    data = AmazonDataModule(
        2023, "all beauty", "full", root=str(tmp_path / "raw"), cache=str(tmp_path / "cache")
    )
    assert data.category == "All_Beauty"
    counts = data.prepared.manifest["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (6, 5, 30)
    assert data.prepared.items["title"].to_list() == [f"Item {n}" for n in range(5)]
    assert data.histories.users.tolist() == [u for u in range(1, 7) for _ in range(5)]


def test_only_the_files_of_a_category_name_what_is_prepared(tmp_path: Path) -> None:
    events = events_file(2023, "full", [("A", "B0", 1.0, 10**9)])
    put(tmp_path, 2023, "full", events, items_file(2023, [item(2023, "B0")]))
    data = AmazonDataModule(2023, "All_Beauty", "full", root=str(tmp_path))
    before = data.local_files()
    assert [Path(name).name.removesuffix(".gz") for name, _, _ in before] == [
        "All_Beauty.jsonl",
        "meta_All_Beauty.jsonl",
    ]
    (tmp_path / "Software.jsonl").write_bytes(b"{}")
    assert data.local_files() == before
    (tmp_path / "All_Beauty.jsonl.gz").write_bytes(b"other")
    assert data.local_files() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"release": 2019, "category": "Books"}, "known are 2014, 2018 and 2023"),
        ({"release": 2018, "category": "Bokks"}, "Did you mean 'Books'"),
        (
            {"release": 2018, "category": "Books", "reviews": "5-core"},
            "expected 5core, full, ratings",
        ),
        ({"release": 2018, "category": "Books", "duplicates": "x"}, "expected 'drop' or 'keep'"),
    ],
)
def test_a_wrong_choice_is_told_when_it_is_made(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AmazonDataModule(**options)
