"""What the service tells Prometheus. No label comes from a client: no address, no query, no path but our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

PREFIX = "nightjar_serve"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32)


@dataclass
class Metrics:
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Answered requests", "route", "code")
        self.seconds = self._histogram("request_seconds", "Time to the last byte of an answer", SECONDS, "route")
        self.cancelled = self._counter("cancelled", "Requests whose client went away first", "route")
        self.refused = self._counter("refused", "Requests refused before any work", "why")
        self.run_rows = self._histogram("embedding_run_rows", "Rows of one run of the model", ROWS, "tower")
        self.run_seconds = self._histogram("embedding_run_seconds", "Time of one run of the model", SECONDS, "tower")
        self.decoders_ended = self._counter("decoders_ended", "Decoder processes that were ended", "why")
        self.renditions = self._counter("renditions", "Thumbnails and full views", "origin")
        self.switches = self._counter("generation_switches", "Generations that were taken up while running")
        self.generation = self._gauge("generation", "Generation that is answered from")
        self.rows = self._gauge("rows", "Pictures in that generation")
        self.behind = self._gauge("generation_behind", "1: a newer generation is shown, but cannot be opened")

    def told(self, tower: str) -> Callable[[int, float], None]:
        """For a batcher: hears rows and seconds of every run."""
        rows, seconds = self.run_rows.labels(tower), self.run_seconds.labels(tower)

        def tell(run_rows: int, run_s: float) -> None:
            rows.observe(run_rows)
            seconds.observe(run_s)

        return tell

    def watch(self, name: str, words: str, value: Callable[[], float]) -> None:
        """A gauge that is read when Prometheus asks."""
        self._gauge(name, words).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", words, labels, registry=self.registry)

    def _gauge(self, name: str, words: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", words, registry=self.registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", words, labels, buckets=buckets, registry=self.registry)
