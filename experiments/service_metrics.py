"""What a service counts, in the text format that Prometheus reads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Histogram:
    """Counts of values up to each bound, as Prometheus adds them up."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str = "") -> Iterator[str]:
        """``labels`` without braces."""
        before = f"{labels}," if labels else ""
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{{before}le="{bound}"}} {total}'
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {self.sum:.6f}"
        yield f"{name}_count{braces} {total}"


class ServiceMetrics:
    """Requests by path and status, how long they took, and what the model was asked at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._sizes, self._model_seconds = Histogram(SIZES), Histogram(SECONDS)
        self._refused = self._late = 0

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered; ``path`` must be one of a few."""
        with self._lock:
            self._requests[path, status] += 1
            self._seconds.setdefault(path, Histogram(SECONDS)).add(seconds)

    def batch(self, asks: int, seconds: float) -> None:
        """The model was asked."""
        with self._lock:
            self._sizes.add(asks)
            self._model_seconds.add(seconds)

    def connection_refused(self) -> None:
        """There were too many."""
        with self._lock:
            self._refused += 1

    def connection_late(self) -> None:
        """It was closed because its client took too long."""
        with self._lock:
            self._late += 1

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of it.

        Args:
            gauges: name -> (help, value now).
        """
        with self._lock:
            return "\n".join([*self._lines(gauges), ""])

    def _lines(self, gauges: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        yield from _head("llmrec_requests_total", "counter", "Requests by path and status.")
        for (path, status), count in sorted(self._requests.items()):
            yield f'llmrec_requests_total{{path="{path}",status="{status}"}} {count}'
        yield from _head("llmrec_request_seconds", "histogram", "From first byte to answer.")
        for path, seconds in sorted(self._seconds.items()):
            yield from seconds.lines("llmrec_request_seconds", f'path="{path}"')
        yield from _head("llmrec_batch_size", "histogram", "Asks of one call of the model.")
        yield from self._sizes.lines("llmrec_batch_size")
        yield from _head("llmrec_model_seconds", "histogram", "Seconds of one call of the model.")
        yield from self._model_seconds.lines("llmrec_model_seconds")
        for name, told, count in (
            ("refused", "Connections closed as they opened: too many.", self._refused),
            ("late", "Connections closed in the middle of a request or answer.", self._late),
        ):
            yield from _head(f"llmrec_connections_{name}_total", "counter", told)
            yield f"llmrec_connections_{name}_total {count}"
        for name, (told, value) in gauges.items():
            yield from _head(name, "gauge", told)
            yield f"{name} {value:g}"


def _head(name: str, kind: str, told: str) -> tuple[str, str]:
    return f"# HELP {name} {told}", f"# TYPE {name} {kind}"
