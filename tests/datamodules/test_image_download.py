"""Downloading images: what a server may do to us, what we may do to it, and what a stopped run leaves."""

from __future__ import annotations

import email.utils
import hashlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from datamodules import image_http
from datamodules.errors import DataSourceError
from datamodules.image_download import Options, Summary, download_images
from datamodules.image_http import Limits, fetch, is_public, retry_after
from datamodules.image_queue import Politeness
from datamodules.image_state import STATE, Record, State
from datamodules.images import open_images
from tests.datamodules.picture_server import (
    PictureServer,
    body,
    dripping,
    in_turn,
    picture,
    serving,
    status,
)

REPO = Path(__file__).resolve().parents[2]
LIMITS = Limits(silence=2, seconds=4, allow_private=True)
FAST = Options(Politeness(backoff=0.02), LIMITS)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PictureServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with serving() as made:
        yield made


def items(addresses: dict[str, Sequence[str] | None]) -> pl.DataFrame:
    schema = {"item_id": pl.String(), "images": pl.List(pl.String())}
    return pl.DataFrame({"item_id": list(addresses), "images": list(addresses.values())}, schema)


def statuses(folder: Path) -> dict[str, str]:
    return dict(pl.read_parquet(folder / "images.parquet").select("item_id", "status").iter_rows())


def run_one(server: PictureServer, folder: Path, *paths: str, options: Options = FAST) -> str:
    download_images(items({"x": [server.url(p) for p in paths]}), folder, options)
    return statuses(folder)["x"]


# ---------------------------------------------------------------- what is kept


def test_every_format_is_kept_as_it_was_sent_and_found_by_the_store(
    server: PictureServer, tmp_path: Path
) -> None:
    sent = {name: picture(name) for name in ("JPEG", "PNG", "WEBP", "GIF")}
    server.pages = {name: body(data) for name, data in sent.items()}
    frame = items({f"../{name}": [server.url(name)] for name in sent} | {"none": None, "empty": []})
    summary = download_images(frame, tmp_path / "images" / "d", FAST)
    assert summary == Summary(
        tmp_path / "images" / "d", 6, 4, 4, sum(map(len, sent.values())), {"no address": 2}, 4
    )
    store = open_images(None, tmp_path, "d")
    assert store is not None
    assert {name: store.read(f"../{name}") for name in sent} == sent
    assert store.mask(["../PNG", "PNG", "none", "../GIF"]).tolist() == [True, False, False, True]
    rows = pl.read_parquet(summary.folder / "images.parquet").rows(named=True)
    assert [r["sha256"] for r in rows[:4]] == [hashlib.sha256(d).hexdigest() for d in sent.values()]
    assert {(r["width"], r["height"]) for r in rows[:4]} == {(8, 6)}
    assert not list(tmp_path.rglob("*.part"))
    assert server.agents == {image_http.USER_AGENT}
    assert "llmrec-lightning" in image_http.USER_AGENT


def test_a_second_run_asks_nothing_and_leaves_the_digest(
    server: PictureServer, tmp_path: Path
) -> None:
    server.pages = {"a": body(picture()), "html": body(b"<html>gone</html>")}
    frame = items({"1": [server.url("a")], "2": [server.url("gone")], "3": [server.url("html")]})
    first = download_images(frame, tmp_path, FAST)
    digest = json.loads((tmp_path / "images.json").read_text())["digest"]
    second = download_images(frame, tmp_path, FAST)
    assert server.counts == {"a": 1, "gone": 1, "html": 1}
    assert (first.new, second.new) == (1, 0)
    assert replace(first, new=0) == second
    assert statuses(tmp_path) == {"1": "ok", "2": "http 404", "3": "not an image"}
    assert json.loads((tmp_path / "images.json").read_text())["digest"] == digest


def test_equal_images_are_one_file(server: PictureServer, tmp_path: Path) -> None:
    server.pages = {"a": body(picture()), "b": body(picture())}
    frame = items({"1": [server.url("a")], "2": [server.url("b")]})
    assert download_images(frame, tmp_path, FAST).bytes == len(picture())
    assert len([p for p in (tmp_path / "files").rglob("*") if p.is_file()]) == 1


def test_the_first_address_that_decodes_wins(server: PictureServer, tmp_path: Path) -> None:
    good = picture("PNG")
    server.pages = {"html": body(b"<html>"), "good": body(good), "other": body(picture("GIF"))}
    assert run_one(server, tmp_path, "gone", "html", "good", "other") == "ok"
    assert server.counts == {"gone": 1, "html": 1, "good": 1}
    table = pl.read_parquet(tmp_path / "images.parquet")
    assert table["address"].to_list() == [server.url("good")]


def test_a_longest_side_is_kept_to(server: PictureServer, tmp_path: Path) -> None:
    server.pages = {"a": body(picture("PNG", (40, 20))), "b": body(picture("PNG", (10, 5)))}
    frame = items({"a": [server.url("a")], "b": [server.url("b")]})
    download_images(frame, tmp_path, replace(FAST, max_side=10))
    rows = pl.read_parquet(tmp_path / "images.parquet").select("format", "width", "height").rows()
    assert rows == [("JPEG", 10, 5), ("PNG", 10, 5)]
    download_images(frame, tmp_path, FAST)  # the originals are another wish
    table = pl.read_parquet(tmp_path / "images.parquet")
    assert table["width"].to_list() == [40, 10]


def test_images_of_items_that_another_filter_leaves_out_stay(
    server: PictureServer, tmp_path: Path
) -> None:
    server.pages = {"a": body(picture()), "b": body(picture("PNG"))}
    download_images(items({"a": [server.url("a")], "b": [server.url("b")]}), tmp_path, FAST)
    summary = download_images(items({"a": [server.url("a")]}), tmp_path, FAST)
    assert (summary.items, summary.downloaded) == (1, 1)
    assert statuses(tmp_path) == {"a": "ok", "b": "ok"}


# ---------------------------------------------------------------- what servers do


CUT = picture(size=(300, 300))


@pytest.mark.parametrize(
    ("answer", "expected", "requests"),
    [
        (in_turn(status(500), body(CUT)), "ok", 2),
        (status(500), "http 500", 3),
        (status(410), "http 410", 1),
        (status(403), "http 403", 1),
        (body(CUT[:500], length=len(CUT)), "cut off", 3),
        (in_turn(body(CUT[:500], length=len(CUT)), body(CUT)), "ok", 2),
        (body(CUT[:500], length=None), "cut off", 3),
        (body(CUT[:500]), "damaged image", 1),
        (body(b""), "not an image", 1),
        (body(b"<svg onload='alert(1)'/>"), "not an image", 1),
        (status(302, Location="/x"), "too many redirects", 6),
        (status(302, Location="file:///etc/passwd"), "bad address", 1),
        (status(302, Location="ftp://127.0.0.1/x"), "bad address", 1),
        (status(302), "http 302", 1),
    ],
)
def test_what_becomes_of_an_answer(
    server: PictureServer, tmp_path: Path, answer: Any, expected: str, requests: int
) -> None:
    server.pages["x"] = answer
    assert run_one(server, tmp_path, "x") == expected
    assert server.counts["x"] == requests
    asked_again = expected not in ("ok", "http 410", "damaged image", "not an image")
    run_one(server, tmp_path, "x")
    assert (server.counts["x"] > requests) == asked_again


def test_a_redirect_is_followed(server: PictureServer, tmp_path: Path) -> None:
    server.pages = {"x": status(301, Location="/deep/y"), "deep/y": body(picture())}
    assert run_one(server, tmp_path, "x") == "ok"


@pytest.mark.parametrize("length", [None, -1])
def test_too_many_bytes_are_not_read_to_their_end(
    server: PictureServer, tmp_path: Path, length: int | None
) -> None:
    big = picture("PNG") + b"x" * 50_000_000
    server.pages["x"] = body(big, length=length)
    small = replace(FAST, limits=replace(LIMITS, max_bytes=100_000))
    assert run_one(server, tmp_path, "x", options=small) == "too large"
    assert run_one(server, tmp_path, "x", options=small) == "too large"
    assert server.counts["x"] == 1  # a larger limit would be another wish
    server.pages["x"] = body(picture("PNG") + b"x" * 100_000)
    assert run_one(server, tmp_path, "x") == "ok"


def test_a_picture_of_too_many_pixels_is_not_decoded(server: PictureServer, tmp_path: Path) -> None:
    png = bytearray(picture("PNG"))
    png[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the header
    server.pages["x"] = body(bytes(png))
    begin = time.monotonic()
    assert run_one(server, tmp_path, "x") in ("too many pixels", "not an image")
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("answer", [body(b"", pause=3), dripping(b"x" * 100, 0.05)])
def test_a_slow_server_costs_a_bounded_time(
    server: PictureServer, tmp_path: Path, answer: Any
) -> None:
    server.pages["x"] = answer
    quick = Options(Politeness(attempts=1), Limits(silence=0.3, seconds=0.6, allow_private=True))
    begin = time.monotonic()
    server.pages["ok"] = body(picture())
    frame = items({"x": [server.url("x")], "y": [server.url("ok")]})
    download_images(frame, tmp_path, quick)
    assert statuses(tmp_path) == {"x": "timeout", "y": "ok"}
    assert time.monotonic() - begin < 2


def test_headers_that_drip_cost_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    begin = time.monotonic()
    script = (
        "import socket, sys, time\n"
        "s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
        "c, _ = s.accept(); c.send(b'HTTP/1.1 200 OK\\r\\n')\n"
        "for i in range(100):\n    c.send(b'X-A: b\\r\\n'); time.sleep(0.1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        answer = fetch(f"http://127.0.0.1:{port}/x", replace(LIMITS, seconds=0.5))
        child.kill()
    assert answer.status == "timeout"
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    "address",
    ["", "file:///etc/passwd", "ftp://h/x", "http://", "//h/x", "http://u:p@127.0.0.1/x", "javascript:1",
     "http://[::1", "http://127.0.0.1:99999/x", "data:image/png;base64,xx", "\n", "http://a b/x"],
)  # fmt: skip
def test_what_is_no_web_address_is_never_asked(address: str) -> None:
    assert fetch(address, LIMITS).status in ("bad address", "no connection")


@pytest.mark.parametrize("path", ["a b", "ü", "a%20b", "x?y=1&z=[2]"])
def test_odd_letters_in_an_address(server: PictureServer, path: str) -> None:
    for asked in (path, path.replace(" ", "%20"), "%C3%BC"):
        server.pages[asked] = body(picture())
    assert fetch(server.url(path), LIMITS).status == "ok"


# ---------------------------------------------------------------- where we may go


@pytest.mark.parametrize(
    ("address", "expected"),
    [("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
     ("192.168.0.1", False), ("172.16.9.9", False), ("169.254.169.254", False), ("0.0.0.0", False),
     ("224.0.0.1", False), ("::1", False), ("fe80::1", False), ("fc00::1", False),
     ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", True), ("64:ff9b::7f00:1", False),
     ("2002:7f00:1::", False), ("100.64.0.1", False)],
)  # fmt: skip
def test_which_addresses_are_public(address: str, expected: bool) -> None:
    assert is_public(address) is expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1"])
def test_a_private_host_is_not_even_connected_to(server: PictureServer, host: str) -> None:
    answer = fetch(server.url("x", host), replace(LIMITS, allow_private=False))
    assert answer.status == "private address"
    assert server.asked == []


def test_a_redirect_to_a_private_host_is_refused(
    server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_http, "is_public", lambda ip: ip != "127.0.0.2")
    server.pages["x"] = status(302, Location=server.url("y", "127.0.0.2"))
    answer = fetch(server.url("x"), replace(LIMITS, allow_private=False))
    assert (answer.status, server.counts) == ("private address", {"x": 1})


def test_a_proxy_is_used_and_private_names_stay_refused(
    server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url(""))
    monkeypatch.delenv("no_proxy")
    asked = "http://pictures.invalid/x"  # a name that only the proxy can look up
    server.pages[asked[1:]] = body(picture())  # a proxy is asked for the whole address
    public = replace(LIMITS, allow_private=False)
    assert fetch(asked, public) == image_http.Answer("ok", picture(), complete=True)
    assert fetch("http://127.0.0.1:1/x", public).status == "private address"
    assert len(server.asked) == 1


# ---------------------------------------------------------------- manners


def test_no_more_at_once_than_a_host_is_due(server: PictureServer, tmp_path: Path) -> None:
    names = [str(i) for i in range(12)]
    server.pages = {n: body(picture(shade=int(n)), pause=0.05) for n in names}
    options = Options(Politeness(workers=8, per_host=2), LIMITS)
    download_images(items({n: [server.url(n)] for n in names}), tmp_path, options)
    assert server.most_active == 2
    assert set(statuses(tmp_path).values()) == {"ok"}


def test_a_delay_is_kept_between_requests(server: PictureServer, tmp_path: Path) -> None:
    names = [str(i) for i in range(5)]
    server.pages = {n: body(picture()) for n in names}
    options = Options(Politeness(delay=0.1), LIMITS)
    download_images(items({n: [server.url(n)] for n in names}), tmp_path, options)
    times = sorted(when for _, when in server.asked)
    assert times[-1] - times[0] >= 0.1 * 4 * 0.9


def test_retry_after_is_obeyed(server: PictureServer, tmp_path: Path) -> None:
    server.pages["x"] = in_turn(status(429, Retry_After="1"), body(picture()))
    assert run_one(server, tmp_path, "x") == "ok"
    first, second = server.times("x")
    assert second - first >= 0.99


def test_a_host_that_wants_a_long_pause_is_left_alone(
    server: PictureServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.pages = {str(i): status(503, Retry_After="99999") for i in range(30)}
    frame = items({n: [server.url(n), server.url("good", "localhost")] for n in server.pages})
    server.pages["good"] = body(picture())
    summary = download_images(frame, tmp_path, FAST)
    assert summary.downloaded == 30  # the next address lies on another host
    assert sum(server.counts[str(i)] for i in range(30)) <= FAST.politeness.per_host
    assert "asks to come back in 99,999 s" in caplog.text
    assert len(summary.left_alone) == 1


def test_a_host_that_refuses_everything_is_left_alone_and_others_go_on(
    server: PictureServer, tmp_path: Path
) -> None:
    bad, good = [f"b{i}" for i in range(40)], [f"g{i}" for i in range(10)]
    server.pages = {n: status(403) for n in bad} | {n: body(picture()) for n in good}
    frame = items(
        {n: [server.url(n)] for n in bad} | {n: [server.url(n, "localhost")] for n in good}
    )
    options = replace(FAST, politeness=replace(FAST.politeness, patience=7))
    summary = download_images(frame, tmp_path, options)
    assert summary.downloaded == 10
    refused = sum(server.counts[n] for n in bad)
    assert 7 <= refused < 7 + options.politeness.per_host
    assert summary.missing == {"http 403": refused, "not fetched yet": 40 - refused}
    assert "7 requests in a row failed, the last with 'http 403'" in summary.left_alone[0]


def test_many_dead_addresses_are_no_refusal(server: PictureServer, tmp_path: Path) -> None:
    server.pages["good"] = body(picture())
    frame = items(
        {str(i): [server.url(f"gone{i}")] for i in range(60)} | {"g": [server.url("good")]}
    )
    summary = download_images(frame, tmp_path, FAST)
    assert summary.missing == {"http 404": 60}
    assert summary.downloaded == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("7", 7), ("", None), ("soon", None), ("-1", None), ("9" * 30, None)]
)
def test_retry_after_texts(text: str, seconds: float | None) -> None:
    assert retry_after(text) == seconds


def test_retry_after_dates() -> None:
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert retry_after(later) == pytest.approx(30, abs=1.5)
    assert retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0


# ---------------------------------------------------------------- ends of a run


def test_without_network_it_says_so_and_leaves_no_table(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    frame = items({str(i): [f"http://127.0.0.1:{port}/{i}"] for i in range(50)})
    with pytest.raises(DataSourceError, match=r"none of 1 hosts answered .* data\.images=PATH"):
        download_images(frame, tmp_path, FAST)
    assert {p.name for p in tmp_path.iterdir()} <= {STATE, ".lock"}
    assert (tmp_path / STATE).read_bytes() == b""


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"):
        code = (
            "import sys\nfrom pathlib import Path\nimport polars as pl\n"
            "from datamodules.image_download import download_images\n"
            "frame = pl.DataFrame({'item_id': ['1'], 'images': [['http://127.0.0.1:1/x']]})\n"
            "download_images(frame, Path(sys.argv[1]))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, capture_output=True, text=True
        )
    assert "DataSourceError: another run is downloading into" in done.stderr


def test_a_folder_that_cannot_be_written_is_one_sentence(
    server: PictureServer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataSourceError, match="cannot be stored there"):
        download_images(items({"1": None}), tmp_path / "file" / "d", FAST)
    (tmp_path / "files").write_bytes(b"in the way")
    server.pages["x"] = body(picture())
    with pytest.raises(DataSourceError, match="cannot be stored there"):
        download_images(items({"1": [server.url("x")]}), tmp_path, FAST)


def test_a_deleted_image_is_fetched_again(server: PictureServer, tmp_path: Path) -> None:
    server.pages["x"] = body(picture())
    run_one(server, tmp_path, "x")
    next(p for p in (tmp_path / "files").rglob("*.jpeg")).unlink()
    assert run_one(server, tmp_path, "x") == "ok"
    assert server.counts["x"] == 2


CRAWL = """
import sys
from pathlib import Path
import polars as pl
from datamodules.image_download import Options, download_images
from datamodules.image_http import Limits
folder, *urls = sys.argv[1:]
frame = pl.DataFrame({"item_id": [str(i) for i in range(len(urls))], "images": [[u] for u in urls]})
download_images(frame, Path(folder), Options(limits=Limits(allow_private=True)))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_ends_soon_and_loses_only_what_was_under_way(
    server: PictureServer, tmp_path: Path, how: signal.Signals
) -> None:
    names = [str(i) for i in range(40)]
    server.pages = {n: body(picture(shade=int(n)), pause=0.05 if int(n) < 12 else 9) for n in names}
    urls = [server.url(n) for n in names]
    with subprocess.Popen(
        [sys.executable, "-c", CRAWL, str(tmp_path), *urls], cwd=REPO, stderr=subprocess.PIPE
    ) as child:
        deadline = time.monotonic() + 20
        while len(server.asked) < 16 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        begin = time.monotonic()
        child.send_signal(how)
        child.wait(timeout=10)
        assert time.monotonic() - begin < 3
    assert (tmp_path / "images.parquet").exists() == (how == signal.SIGINT)
    with (tmp_path / STATE).open("ab") as log:
        log.write(b'{"item": "39", "addr')  # a line that a power cut has torn
    server.pages = {n: body(picture(shade=int(n))) for n in names}
    download_images(items({n: [u] for n, u in zip(names, urls, strict=True)}), tmp_path, FAST)
    assert set(statuses(tmp_path).values()) == {"ok"}
    assert [server.counts[n] for n in names[:12]] == [1] * 12
    assert max(server.counts.values()) == 2


# ---------------------------------------------------------------- the log


@given(st.binary(max_size=200), st.text(min_size=1), st.text())
def test_any_log_can_be_opened_and_continued(junk: bytes, item: str, address: str) -> None:
    item, address = (text.encode("utf-8", "replace").decode() for text in (item, address))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / STATE).write_bytes(junk)
        state = State(Path(folder))
        record = Record(item, address, "ok", 3, "PNG", 2, 1, "0" * 64, None, 9)
        state.add(record)
        state.close()
        again = State(Path(folder))
        assert again.records[item][address] == record
        again.close()


def test_a_log_of_other_types_is_not_believed(tmp_path: Path) -> None:
    lines = [{"item": 1, "address": "a", "status": "ok"}, {"item": "1", "evil": 2}, [1], "x", None]
    lines += [{"item": "1", "address": "a", "status": "ok", "bytes": "many"}]
    (tmp_path / STATE).write_text("\n".join(map(json.dumps, lines)) + "\n")
    state = State(tmp_path)
    assert state.records == {}
    state.close()
