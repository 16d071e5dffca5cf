"""One image by HTTP, from an address that a stranger wrote: bounded in bytes and time, public hosts only.

urllib rather than httpx or requests: the project's other downloads use it, it obeys the user's proxy
variables, needs no further dependency, and lets us connect to the very address that was checked, so
that a name cannot point to a public machine when it is looked at and to a private one a moment later.
"""

from __future__ import annotations

import email.utils
import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

USER_AGENT = "llmrec-lightning (research; downloads each item image of a public data set once)"
_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # may pass within a run


@dataclass(frozen=True)
class Limits:
    """What one request may cost, and where it may go."""

    max_bytes: int = 20_000_000
    silence: float = 10.0  # seconds to connect, and between two pieces of an answer
    seconds: float = 60.0  # for an address with all its redirects
    redirects: int = 5
    allow_private: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of one address.

    ``status`` is ``ok`` or a short reason. ``again`` says that the same request may succeed soon,
    ``refused`` that the host did not serve it (so that many in a row mean: leave it alone), and
    ``wait`` how many seconds it asked for. ``complete``: the host said how long the image is, and it was.
    """

    status: str
    data: bytes = b""
    again: bool = False
    refused: bool = False
    wait: float | None = None
    complete: bool = False


class PrivateAddressError(OSError):
    """A host that is not on the public internet."""


def host_of(address: str) -> str:
    """Host and port, the unit of politeness; empty for what is no http(s) address."""
    try:
        parts = urllib.parse.urlsplit(address)
        named = parts.scheme in ("http", "https") and parts.username is None
        return f"{parts.hostname}:{parts.port or parts.scheme}" if named and parts.hostname else ""
    except ValueError:
        return ""


def is_public(address: str) -> bool:
    """Whether an IP address lies on the public internet (also one that is wrapped into IPv6)."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # IPv4 behind a translator
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast


def fetch(address: str, limits: Limits) -> Answer:
    """Get one address; every way to fail is an ``Answer``."""
    end = time.monotonic() + limits.seconds
    for _ in range(limits.redirects + 1):
        if not host_of(address):
            return Answer("bad address")
        answer = _one_request(address, limits, end)
        if isinstance(answer, Answer):
            return answer
        address = urllib.parse.urljoin(address, answer)
    return Answer("too many redirects")


def _one_request(address: str, limits: Limits, end: float) -> Answer | str:
    """The answer, or where the host sends us."""
    left = end - time.monotonic()
    if left <= 0:
        return Answer("timeout", again=True, refused=True)
    with _Guard(left, limits.allow_private) as guard:
        try:
            with _open(address, guard, min(limits.silence, left)) as response:
                return _read(response, limits, guard)
        except urllib.error.HTTPError as error:
            with error:
                return _http_error(error)
        except Exception as error:  # a hostile answer can raise nearly anything from the parsers
            return _failure(error, guard)


def _read(response: http.client.HTTPResponse, limits: Limits, guard: _Guard) -> Answer:
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isascii() and length.isdecimal() and len(length) < 16 else None
    if total is not None and total > limits.max_bytes:
        return Answer("too large")
    parts, size = list[bytes](), 0
    while chunk := response.read1(_CHUNK):
        parts.append(chunk)
        size += len(chunk)
        if size > limits.max_bytes:
            return Answer("too large")
    if guard.expired:
        return Answer("timeout", again=True, refused=True)
    if total is not None and size < total:
        return Answer("cut off", again=True, refused=True)
    return Answer("ok", b"".join(parts), complete=total is not None)


def _http_error(error: urllib.error.HTTPError) -> Answer | str:
    if error.code in _REDIRECTS and (target := error.headers.get("Location")):
        return str(target)
    gone = error.code in (404, 410)
    wait = retry_after(error.headers.get("Retry-After", "")) if error.code in (429, 503) else None
    return Answer(f"http {error.code}", again=error.code in _BUSY, refused=not gone, wait=wait)


def retry_after(text: str) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date; None for anything else."""
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _failure(error: Exception, guard: _Guard) -> Answer:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, PrivateAddressError):
        return Answer("private address")
    if guard.expired or isinstance(reason, TimeoutError):
        return Answer("timeout", again=True, refused=True)
    if isinstance(reason, ssl.SSLError):  # also a ValueError, if the certificate is bad
        return Answer("no secure connection", refused=True)
    if isinstance(reason, http.client.InvalidURL | ValueError):
        return Answer("bad address")
    status = "cut off" if guard.connected else "no connection"
    return Answer(status, again=True, refused=True)


class _Guard:
    """Ends a connection when its time is over, however slowly the host drips; opens it as well."""

    def __init__(self, seconds: float, allow_private: bool) -> None:
        self.expired = self.connected = False
        self.allow_private = allow_private
        self._end = time.monotonic() + seconds
        self._handle: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> _Guard:
        self._timer.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()
        if self._handle is not None:
            self._handle.close()

    def _cut(self) -> None:
        self.expired = True
        handle = self._handle
        try:
            if handle is not None:
                handle.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it had ended by itself

    def connect(
        self, address: tuple[str, int], timeout: float, source: object = None, *, public: bool
    ) -> socket.socket:
        """Stands in for ``socket.create_connection``: connects only to what was looked at."""
        places = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        if public and not self.allow_private:
            hidden = [str(place[4][0]) for place in places if not is_public(str(place[4][0]))]
            if hidden:
                raise PrivateAddressError(f"{address[0]} is {hidden[0]}")
        failure: OSError = OSError(f"{address[0]} has no address")
        for place in places:
            if time.monotonic() >= self._end:
                raise TimeoutError("no time is left")
            try:
                made = socket.create_connection((str(place[4][0]), address[1]), timeout)
            except OSError as error:
                failure = error
                continue
            # A duplicate, because TLS takes the socket itself over; shutting it down ends both.
            self._handle, self.connected = made.dup(), True
            return made
        raise failure


def _open(address: str, guard: _Guard, silence: float) -> http.client.HTTPResponse:
    """Send one GET, through the user's proxy if there is one; redirects are not followed."""
    # Addresses in the wild hold blanks and letters that HTTP does not allow.
    url = urllib.parse.quote(address.strip(), safe="%/:=&?~#+!$,;'@()*[]")
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxied = parts.scheme in proxies and not urllib.request.proxy_bypass(parts.hostname or "")
    if proxied and not guard.allow_private:
        _require_public_name(parts.hostname or "")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(proxies if proxied else {}),
        _Http(guard, public=not proxied),
        _Https(guard, public=not proxied),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    headers = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers)
    response: http.client.HTTPResponse = opener.open(request, timeout=silence)
    return response


def _require_public_name(host: str) -> None:
    """Behind a proxy only the proxy connects; refuse what we can see to be private all the same."""
    try:
        found = [str(place[4][0]) for place in socket.getaddrinfo(host, None)]
    except OSError:
        return  # only the proxy can look names up here
    if hidden := [ip for ip in found if not is_public(ip)]:
        raise PrivateAddressError(f"{host} is {hidden[0]}")


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # reading the certificates takes 20 ms


def _connection(kind: Callable[..., Any], guard: _Guard, public: bool) -> Callable[..., Any]:
    def make(host: str, **options: Any) -> Any:
        made = kind(host, **options)
        made._create_connection = functools.partial(guard.connect, public=public)
        return made

    return make


class _Http(urllib.request.HTTPHandler):
    def __init__(self, guard: _Guard, public: bool) -> None:
        super().__init__()
        self._make = _connection(http.client.HTTPConnection, guard, public)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._make, request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, guard: _Guard, public: bool) -> None:
        super().__init__()
        self._make = _connection(http.client.HTTPSConnection, guard, public)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._make, request, context=_tls())
