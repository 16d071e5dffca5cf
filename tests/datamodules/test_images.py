"""Images from a folder, a tar or a download: who has one, what it looks like, and whose it is."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.image_decoding import BadImageError, decode, inspect, shrink, upright_size
from datamodules.image_ids import read_ids
from datamodules.image_listing import file_key, image_stamp
from datamodules.images import ImageStore, download_folder, open_images
from datamodules.movielens_formats import load_movielens
from tests.datamodules.picture_server import picture

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "movielens"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real data lie outside the repository")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def opened(place: Path, cache: Path, **options: dict[str, str]) -> ImageStore:
    store = open_images(place, cache, "d", **options)
    assert store is not None
    return store


FILES = {
    "posters/1.jpg": picture("JPEG"), "posters/2.PNG": picture("PNG"), "3.webp": picture("WEBP"),
    "4.gif": picture("GIF"), "5.JPEG": picture("JPEG", shade=9), "readme.txt": b"no", ".6.jpg": b"no",
    "posters/._1.jpg": b"a Mac's note", "a%2Fb.jpg": picture("JPEG", shade=30),
}  # fmt: skip
IDS = {"1": "posters/1.jpg", "2": "posters/2.PNG", "3": "3.webp", "4": "4.gif", "5": "5.JPEG"}
IDS |= {"a/b": "a%2Fb.jpg"}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_folder_and_a_tar_say_the_same(tmp_path: Path, kind: str) -> None:
    place = tmp_path / kind
    if kind == "tar":
        make_tar(place, FILES)
    else:
        make_folder(place, FILES)
    store = opened(place, tmp_path / "cache")
    asked = [*IDS, "6", "readme", "posters/1", "../folder/posters/1", "", ".6", "a%2Fb"]
    expected = [True] * len(IDS) + [False] * 7
    assert store.has(asked).tolist() == store.mask(asked).tolist() == expected
    assert len(store) == len(IDS)
    assert {i: store.read(i) for i in IDS} == {i: FILES[name] for i, name in IDS.items()}
    for item, name in IDS.items():
        image = store.open(item)
        assert image is not None
        assert image.mode == "RGB"
        plain = Image.open(io.BytesIO(FILES[name])).convert("RGB")
        assert np.array_equal(np.asarray(image), np.asarray(plain))
    assert store.read("none") is None
    assert store.open("none") is None


def test_the_digest_is_of_ids_and_content_alone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = opened(make_folder(tmp_path / "f", FILES), cache)
    tar = opened(make_tar(tmp_path / "t.tar", FILES), cache)
    assert folder.digest == tar.digest
    assert folder.digest_of(["1", "2"]) == tar.digest_of(["2", "1", "2", "none"])
    other = opened(make_folder(tmp_path / "g", FILES | {"4.gif": picture("GIF", shade=5)}), cache)
    assert other.digest != folder.digest
    assert other.digest_of(["1", "2"]) == folder.digest_of(["1", "2"])
    assert other.digest_of(["4"]) != folder.digest_of(["4"])
    swapped = {"1.jpg": FILES["posters/2.PNG"], "2.jpg": FILES["posters/1.jpg"]}
    assert opened(make_folder(tmp_path / "s", swapped), cache).digest_of(["1", "2"]) != (
        folder.digest_of(["1", "2"])
    )


def test_the_stamp_changes_with_the_files_and_with_nothing_else(tmp_path: Path) -> None:
    place = make_folder(tmp_path / "f", {"1.jpg": picture(), "notes.txt": b"x"})
    before = image_stamp(place)
    (place / "notes.txt").write_bytes(b"longer")
    assert image_stamp(place) == before
    (place / "1.jpg").write_bytes(picture("PNG"))
    assert image_stamp(place) != before
    assert image_stamp(tmp_path / "absent") is None


def test_a_survey_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_folder(tmp_path / "f", FILES)
    first = opened(place, tmp_path / "cache")
    mask, digest = first.mask(list(IDS)), first.digest
    monkeypatch.setattr(ImageStore, "_look", lambda self: pytest.fail("looked twice"))
    second = opened(place, tmp_path / "cache")
    assert second.mask(list(IDS)).tolist() == mask.tolist()
    assert second.digest == digest
    for file in (tmp_path / "cache").rglob("*.npz"):
        file.write_bytes(b"torn")
    with pytest.raises(pytest.fail.Exception):
        _ = opened(place, tmp_path / "cache").survey


def test_a_damaged_image_is_out_of_the_mask_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = picture(size=(200, 200))[:700]
    place = make_folder(
        tmp_path / "f", {"1.jpg": picture(), "2.jpg": cut, "3.png": b"<html>", "4.gif": b""}
    )
    store = opened(place, tmp_path / "cache")
    ids = ["1", "2", "3", "4", "5"]
    assert store.has(ids).tolist() == [True, True, True, True, False]
    assert store.mask(ids).tolist() == [True, False, False, False, False]
    assert "3 of 4 files are no good images" in caplog.text
    for item in ("2", "3", "4"):
        with pytest.raises(
            DataFormatError, match=rf"{item}\.\w+: the image of item '{item}' .* mask"
        ):
            store.open(item)


def test_a_file_of_too_many_bytes_counts_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.images.MAX_BYTES", 5_000)
    big = picture("PNG") + bytes(5_000)
    store = opened(make_folder(tmp_path / "f", {"1.png": big, "2.png": picture()}), tmp_path / "c")
    assert store.mask(["1", "2"]).tolist() == [False, True]
    with pytest.raises(DataFormatError, match="at most 5,000"):
        store.read("1")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_place_that_changes_under_our_hands_is_noticed(tmp_path: Path, kind: str) -> None:
    files = {"1.png": picture("PNG"), "2.png": picture("PNG", (9, 9))}
    place = tmp_path / kind
    make = make_tar if kind == "tar" else make_folder
    store = opened(make(place, files), tmp_path / "cache")
    make(place, {"1.png": picture("PNG", (50, 50))} | {"0.png": b"x"})
    with pytest.raises(DataSourceError, match="has changed"):
        store.read("1")
    if kind == "folder":
        (place / "2.png").unlink()
        with pytest.raises(DataSourceError, match="cannot be read"):
            store.read("2")


def _child(store: ImageStore, answers: multiprocessing.Queue[object]) -> None:
    answers.put((store.mask(["1", "x"]).tolist(), store.read("1")))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_goes_to_workers(tmp_path: Path, method: str) -> None:
    store = opened(make_tar(tmp_path / "t.tar", FILES), tmp_path / "cache")
    assert len(pickle.dumps(store)) < 10_000  # where the images are, not the images
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read("1") == FILES["posters/1.jpg"]
    if method == "spawn":
        return  # what spawning does beyond pickling would cost seconds here
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_child, args=(store, answers))
    child.start()
    assert answers.get(timeout=20) == ([True, False], FILES["posters/1.jpg"])
    child.join()


# ---------------------------------------------------------------- places that are wrong


def test_nothing_given_and_nothing_downloaded_is_none(tmp_path: Path) -> None:
    assert open_images(None, tmp_path, "d") is None
    assert download_folder(tmp_path, "d") == tmp_path / "images" / "d"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.zip"])
def test_a_packed_archive_is_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataSourceError, match=r"unpack it .* plain \.tar"):
        open_images(tmp_path / name, tmp_path, "d")


def test_a_packed_archive_in_disguise_is_refused(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", FILES, "w:gz")
    with pytest.raises(DataSourceError, match="plain tar"):
        open_images(tmp_path / "a.tar", tmp_path, "d")


def test_a_missing_place_and_one_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataSourceError, match="neither a folder nor a tar"):
        open_images(tmp_path / "none", tmp_path, "d")
    with pytest.raises(DataSourceError, match=r"holds no image; .* 1193\.jpg"):
        open_images(make_folder(tmp_path / "f", {"1.txt": b"x"}), tmp_path, "d")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_two_files_for_one_item_are_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / kind
    files = {"a/1.jpg": picture(), "b/1.png": picture("PNG")}
    make_tar(place, files) if kind == "tar" else make_folder(place, files)
    with pytest.raises(DataFormatError, match=r"a/1\.jpg and b/1\.png are both for item '1'"):
        open_images(place, tmp_path, "d")


def test_the_last_of_equal_members_counts(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", {"1.png": picture("PNG", shade=1)})
    make_tar(path, {"1.png": picture("PNG", shade=2)}, "a")
    assert opened(path, tmp_path / "c").read("1") == picture("PNG", shade=2)


def test_a_tar_cannot_lead_out_of_itself(tmp_path: Path) -> None:
    make_folder(tmp_path, {"secret.jpg": picture()})
    path = tmp_path / "t" / "t.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as file:
        for kind, name in ((tarfile.SYMTYPE, "1.jpg"), (tarfile.LNKTYPE, "2.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../secret.jpg"
            file.addfile(info)
        info = tarfile.TarInfo("../../3.jpg")  # a name, not a place
        info.size = len(picture("PNG"))
        file.addfile(info, io.BytesIO(picture("PNG")))
    store = opened(path, tmp_path / "c")
    assert store.has(["1", "2", "3", "../../3"]).tolist() == [False, False, True, False]
    assert store.read("3") == picture("PNG")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_tar_is_refused_or_gives_whole_images(tmp_path: Path, seed: int) -> None:
    """500 bytes and cuts in all: nothing but our own errors, and never bytes that are not there."""
    draw, told, failed = random.Random(seed), 0, 0
    members = {f"{i}.png": picture("PNG", shade=i) for i in range(5)}
    whole = make_tar(tmp_path / "t.tar", members).read_bytes()
    for number in range(13):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 5, 40))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        data = data[: draw.randrange(len(data))] if number % 3 == 0 else data
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        try:
            store = opened(path, tmp_path / "cache")
            ids = list(store.listing.keys)
            for item, good in zip(ids, store.mask(ids), strict=True):
                if good:
                    assert store.open(item) is not None
        except (DataSourceError, DataFormatError) as error:
            told += str(path) in str(error)
            failed += 1
    assert told == failed


def test_a_tar_with_a_broken_header_in_its_middle_is_no_shorter_tar(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", {f"{i}.png": picture("PNG") for i in range(4)})
    with tarfile.open(path) as file:
        third = file.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[third + 150] ^= 1  # in the header's checksum
    path.write_bytes(data)
    with pytest.raises(DataSourceError, match=r"what follows '1\.png' is no member"):
        open_images(path, tmp_path, "d")


def test_a_download_folder_cannot_lead_out_of_itself(tmp_path: Path) -> None:
    row = {"item_id": ["1"], "status": ["ok"], "bytes": [1], "format": ["JPEG"]}
    folder = download_folder(tmp_path, "d")
    folder.mkdir(parents=True)
    for sha256 in ("../../../x", "A" * 64, None, "0" * 63 + "\n"):
        table = pl.DataFrame(row | {"sha256": [sha256]}, schema_overrides={"sha256": pl.String})
        table.write_parquet(folder / "images.parquet")
        with pytest.raises(DataSourceError, match="names no stored files"):
            open_images(None, tmp_path, "d")
    (folder / "images.parquet").write_bytes(b"torn")
    with pytest.raises(DataSourceError, match="run make images again"):
        open_images(None, tmp_path, "d")


@given(st.text(), st.text())
def test_names_of_files_are_safe_and_of_one_item(one: str, other: str) -> None:
    key = file_key(one)
    assert "/" not in key
    assert "\0" not in key
    assert not key.startswith(".")
    assert (key == file_key(other)) == (one == other)


# ---------------------------------------------------------------- pictures


def test_transparent_parts_are_white_and_grey_stays_grey() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (2, 1), (200, 0, 0, 0)).save(out, "PNG")
    assert decode(out.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    deep = io.BytesIO()
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16)).save(deep, "PNG")
    assert np.asarray(decode(deep.getvalue()))[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("side", range(1, 9))
def test_a_photo_is_turned_upright_and_its_size_known_before(kind: str, side: int) -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = side  # 5 to 8: turned by a quarter
    Image.new("RGB", (4, 2)).save(out, kind, exif=exif)
    expected = (2, 4) if side >= 5 else (4, 2)
    assert decode(out.getvalue()).size == upright_size(out.getvalue()) == expected


@pytest.mark.parametrize("data", [b"", b"BM" + bytes(100), b"%PDF-1.4", b"GIF89a", b"<svg/>"])
def test_other_formats_are_refused(data: bytes) -> None:
    for look in (inspect, upright_size):
        with pytest.raises(BadImageError):
            look(data)


def test_a_tiff_and_a_bitmap_are_no_images_here() -> None:
    for name in ("TIFF", "BMP", "ICO", "PPM"):
        out = io.BytesIO()
        Image.new("RGB", (16, 16)).save(out, name)
        with pytest.raises(BadImageError, match="not an image"):
            inspect(out.getvalue())


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    out = io.BytesIO()
    Image.new("1", (8_000, 8_000)).save(out, "PNG")
    with pytest.raises(BadImageError, match="too many pixels: 8000 x 8000"):
        decode(out.getvalue())


def test_shrinking_keeps_small_ones_and_the_shape() -> None:
    small, large = picture("PNG", (30, 10)), picture("PNG", (90, 30))
    assert shrink(small, 30) is small
    assert decode(shrink(large, 30)).size == (30, 10)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_pictures_are_told_or_shown(name: str) -> None:
    """150 a format: ``inspect`` passes what ``decode`` can show, and raises nothing but its own error."""
    draw, whole = random.Random(name), picture(name, (24, 24))
    told = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 3, 20))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        cut = bytes(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)
        try:
            facts = inspect(cut)
        except BadImageError:
            told += 1
        else:
            assert sorted(decode(cut).size) == sorted((facts.width, facts.height))
    assert told > 20


# ---------------------------------------------------------------- whose image is whose

ITEMS = pl.DataFrame(
    {"item_id": ["1", "2", "3", "4", "5"],
     "title": ["Heat (1995)", "Twice", "Twin (1990)", None, "Heat (1995)"]}
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [("movies.dat", "6::Heat (1995)::Crime\n7::Twin (1990)::X\n8::Twin (1990)::Y\n9::Caf\xe9::Z\n"),
     ("movies.csv", 'movieId,title,genres\n6,Heat (1995),Crime\n7,"Twin (1990)",X\n8,Twin (1990),Y\n')],
)  # fmt: skip
@pytest.mark.parametrize("inside", [True, False])
def test_equal_titles_share_a_picture_and_unclear_ones_have_none(
    tmp_path: Path, name: str, text: str, inside: bool
) -> None:
    place = make_folder(tmp_path / "f", {"6.jpg": picture()})
    ((place if inside else tmp_path) / name).write_text(text, encoding="latin-1")
    renamed = read_ids("title", place, ITEMS)
    assert renamed == {"1": "6", "5": "6"}
    store = opened(place, tmp_path / "c", renamed=renamed)
    assert store.mask(["1", "2", "3", "5", "6"]).tolist() == [True, False, False, True, False]
    assert store.digest != opened(place, tmp_path / "c").digest


def test_a_stated_map(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text('image_id,item_id\n"x,1",1\ny,2\n')
    assert read_ids(str(tmp_path / "map.csv"), tmp_path, ITEMS) == {"1": "x,1", "2": "y"}
    assert read_ids("id", tmp_path, ITEMS) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("item,image\n1,2\n", r"missing column item_id, image_id"),
     ("item_id,image_id\n1,2\n1,3\n", r"line 3: item '1' is there twice"),
     ("item_id,image_id\n1\n", r"line 2: broken row"), ("", "empty"),
     ("movieId,title\n1,Nothing of ours\n", "no title in it is one of the data's")],
)  # fmt: skip
def test_a_map_that_is_wrong_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(DataFormatError, match=message):
        read_ids(str(tmp_path / "map.csv"), tmp_path, ITEMS)


def test_without_a_title_list_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DataSourceError, match=r"movies\.dat or movies\.csv .* data\.image_ids=PATH"
    ):
        read_ids("title", tmp_path / "posters.tar", ITEMS)
    with pytest.raises(DataSourceError, match=r"is no file; data\.image_ids is id, title"):
        read_ids("titel", tmp_path, ITEMS)


# ---------------------------------------------------------------- real posters


@real
def test_real_posters_of_ml_1m(tmp_path: Path) -> None:
    store = opened(DATA / "posters" / "posters_ml1m.tar", tmp_path)
    raw = load_movielens("1m-sasrec", DATA / "ml-1m", tmp_path)
    ids = raw.interactions.frame["item_id"].unique().to_list()
    assert (len(store), len(ids), int(store.mask(ids).sum())) == (2_292, 3_416, 2_291)
    events = raw.interactions.frame.filter(
        pl.col("item_id").is_in([i for i in ids if store.has([i])[0]])
    )
    assert events.height / raw.interactions.frame.height == pytest.approx(0.958, abs=5e-4)
    with tarfile.open(DATA / "posters" / "posters_ml1m.tar") as file:
        member = file.extractfile("posters/1193.jpg")
        assert member is not None
        assert store.read("1193") == member.read()
    image = store.open("1193")
    assert image is not None
    assert image.width == 200


@real
def test_real_posters_joined_to_ml_100k_by_title(tmp_path: Path) -> None:
    items = load_movielens("100k", DATA / "ml-100k", tmp_path).catalog.frame
    os.symlink(DATA / "posters" / "posters_ml1m.tar", tmp_path / "posters.tar")
    os.symlink(DATA / "ml-1m" / "movies.dat", tmp_path / "movies.dat")
    renamed = read_ids("title", tmp_path / "posters.tar", items)
    assert renamed is not None
    lines = (DATA / "ml-1m" / "movies.dat").read_text("latin-1").splitlines()
    listed = {line.split("::")[1] for line in lines}
    films = (DATA / "ml-100k" / "u.item").read_text("latin-1").splitlines()
    titles = [film.split("|")[1] for film in films]
    assert sum(title in listed for title in titles) == 1_618
    # and three whose title ends in a blank here
    assert sum(title != title.rstrip() and title.rstrip() in listed for title in titles) == 3
    assert (items.height, len(renamed)) == (1_682, 1_621)
    assert renamed["2"] == "10"  # GoldenEye; 2 would be Jumanji
    assert "50" not in renamed  # Star Wars, which ML-1M calls "Star Wars: Episode IV - A New Hope"
