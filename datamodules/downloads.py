"""Fetch one URL into a file: verified, resumed, never half there.

The bytes go to ``NAME.part`` and become ``NAME`` by one rename after their checksum fits. A run
that was cut off goes on where it stopped (HTTP Range), if the server says it is the same file.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from datamodules.errors import DataSourceError

CONNECT_SECONDS = 5.0  # also the longest silence in a transfer
_CHUNK = 1 << 20


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, checksum: str, what: str) -> None:
    """Raise DataSourceError unless ``path`` has the checksum ``"<algorithm>:<hex digest>"``."""
    algorithm, _, expected = checksum.partition(":")
    found = file_digest(path, algorithm)
    if found != expected.lower():
        raise DataSourceError(
            f"{what}: the {algorithm} checksum of {path} is {found}, expected {expected}; the file "
            "is damaged or another version. Delete it and run again."
        )


def download(url: str, path: Path, checksum: str | None = None) -> Path:
    """Make ``path`` hold the verified bytes of ``url`` and return it.

    Args:
        url: what to fetch.
        path: where it shall lie; a complete file that is there already is verified, not fetched.
        checksum: ``"sha256:..."`` or ``"md5:..."``. Without one the first download is trusted: its
            size and SHA-256 are written to ``NAME.first-seen.json`` and hold from then on.

    Raises:
        DataSourceError: no connection, an HTTP error, a cut-off transfer or a wrong checksum.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            _verify_or_record(path, path, checksum, url)
            return path
        part = path.with_name(path.name + ".part")
        _fetch_with_retries(url, part)
        try:
            _verify_or_record(part, path, checksum, url)
        except DataSourceError:
            part.unlink()  # resuming a wrong file would only make a longer wrong file
            _validator_file(part).unlink(missing_ok=True)
            raise
        os.replace(part, path)
        _validator_file(part).unlink(missing_ok=True)
    return path


def _verify_or_record(file: Path, path: Path, checksum: str | None, url: str) -> None:
    record = path.with_name(path.name + ".first-seen.json")
    if checksum is not None:
        verify(file, checksum, url)
    elif record.exists():
        seen = json.loads(record.read_text())
        if (file.stat().st_size, file_digest(file)) != (seen["size"], seen["sha256"]):
            raise DataSourceError(
                f"{url}: {file} has not the size and SHA-256 of the first download, kept in "
                f"{record}; delete {file} and run again, or delete the record as well if the "
                "publisher is known to have changed the file."
            )
    else:
        seen = {"url": url, "size": file.stat().st_size, "sha256": file_digest(file)}
        temporary = record.with_name(record.name + ".part")
        temporary.write_text(json.dumps(seen, indent=1))
        os.replace(temporary, record)


def _fetch_with_retries(url: str, part: Path) -> None:
    """Fetch until complete; give up after two attempts in a row that brought no new byte."""
    fruitless = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_once(url, part)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DataSourceError(f"{url}: the server answered {error}.") from error
            failure: Exception = error
        except (OSError, http.client.HTTPException) as error:
            failure = error
        after = part.stat().st_size if part.exists() else 0
        fruitless = 0 if after > before else fruitless + 1
        if fruitless == 2:
            reason = getattr(failure, "reason", failure) or type(failure).__name__
            raise DataSourceError(f"{url}: could not be fetched ({reason}).") from failure


def _fetch_once(url: str, part: Path) -> None:
    """Append to ``part`` what is missing, or write it anew where the server cannot resume."""
    start = part.stat().st_size if part.exists() else 0
    validator = _read_validator(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": "llmrec-lightning"}
    if start and validator:  # without a validator two versions of a file might be glued together
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    else:
        start = 0
    try:
        response = _open(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file: begin again
            part.unlink(missing_ok=True)
        raise
    with response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status != 206 or not resumed:
            start = 0
        _write_validator(part, response.headers)
        with part.open("ab" if start else "wb") as file:
            _copy(response, file.write, start, url)
            file.flush()
            os.fsync(file.fileno())


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    """``urlopen`` in a thread, because looking a name up obeys no socket timeout."""
    answers: queue.Queue[http.client.HTTPResponse | Exception] = queue.Queue(1)

    def work() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=CONNECT_SECONDS))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=2 * CONNECT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {2 * CONNECT_SECONDS:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _copy(
    response: http.client.HTTPResponse, write: Callable[[bytes], int], start: int, url: str
) -> None:
    from tqdm import tqdm

    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    done = start
    # ``delay``: a bar only for what takes longer than two seconds.
    name = url.rsplit("/", 1)[-1]
    with tqdm(total=total, initial=start, unit="B", unit_scale=True, delay=2, desc=name) as bar:
        while chunk := response.read1(_CHUNK):
            write(chunk)
            done += len(chunk)
            bar.update(len(chunk))
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done} of {total} bytes")


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".validator")


def _read_validator(part: Path) -> str:
    file = _validator_file(part)
    return file.read_text() if file.exists() else ""


def _write_validator(part: Path, headers: http.client.HTTPMessage) -> None:
    etag = headers.get("ETag", "")
    # A weak ETag ("W/...") promises no equal bytes, so HTTP forbids it in If-Range.
    validator = headers.get("Last-Modified", "") if etag.startswith("W/") or not etag else etag
    _validator_file(part).write_text(validator)
