"""Server metrics in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinylm.serving.worker import Load

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server. It calls `load` and `connections` when the metrics are read."""

    def __init__(self, load: Callable[[], Load], connections: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_LoadCollector(load, connections))
        self._responses = Counter(
            "tinylm_responses", "Responses by route and status.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "tinylm_response_seconds",
            "Time from a request's headers to the end of its response.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._prompt_tokens = Counter("tinylm_prompt_tokens", "Prompt tokens of accepted requests.", registry=self._registry)

    def count_response(self, route: str, status: int, seconds: float) -> None:
        """Count a response. `route` must be one of a few fixed values, because each value becomes a time series."""
        self._responses.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_prompt(self, tokens: int) -> None:
        """Count the prompt tokens of an accepted request."""
        self._prompt_tokens.inc(tokens)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], Load], connections: Callable[[], int]) -> None:
        self._load, self._connections = load, connections

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        yield GaugeMetricFamily("tinylm_samples_generating", "Samples that are being generated.", load.generating)
        yield GaugeMetricFamily("tinylm_samples_waiting", "Samples that wait for a free row.", load.waiting)
        yield GaugeMetricFamily(
            "tinylm_seconds_without_progress", "Time since the last token while there are samples to generate.", load.idle_seconds
        )
        yield GaugeMetricFamily("tinylm_connections", "Open connections.", self._connections())
        yield CounterMetricFamily("tinylm_generated_tokens", "Generated tokens.", load.generated_tokens)
