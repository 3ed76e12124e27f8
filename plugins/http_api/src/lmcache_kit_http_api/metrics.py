"""Metrics in Prometheus' text format, in a registry of our own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from lmcache_kit.interfaces.frontend import ControllerAPI
from lmcache_kit.metrics import MetricSet, MetricSpec, counter
from lmcache_kit_http_api.handlers import Document
from lmcache_kit_http_api.routes import Route

_PREFIX = "lmcache_kit_"
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)


_REQUESTS = counter(
    "requests_total", "requests", "Requests answered.", ("method", "route", "status")
)
_SECONDS = MetricSpec(
    "request_seconds",
    "histogram",
    "seconds",
    "Time from the head of a request to its reply.",
    ("route",),
)
HTTP = MetricSet("frontend http", "http_", (_REQUESTS, _SECONDS))


class _ControllerMetrics(Collector):
    def __init__(self, controller: ControllerAPI) -> None:
        self._controller = controller

    def describe(self) -> Iterable[Metric]:
        """Nothing: values are known only when they are collected."""
        return ()

    def collect(self) -> Iterable[Metric]:
        declared = self._controller.metrics
        for sample in declared.samples(self._controller.counters()):
            name = f"{_PREFIX}{declared.prefix}{sample.spec.name}"
            family = CounterMetricFamily if sample.spec.kind == "counter" else GaugeMetricFamily
            yield family(name, sample.spec.help, value=sample.value)


class HttpMetrics:
    """Counts requests, and shows the controller's counters beside them."""

    def __init__(self, controller: ControllerAPI) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_ControllerMetrics(controller))
        self._requests = Counter(
            f"{_PREFIX}{HTTP.prefix}{_REQUESTS.name}",
            _REQUESTS.help,
            _REQUESTS.labels,
            registry=self._registry,
        )
        self._seconds = Histogram(
            f"{_PREFIX}{HTTP.prefix}{_SECONDS.name}",
            _SECONDS.help,
            _SECONDS.labels,
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._children: dict[tuple[Route | None, int], tuple[Counter, Histogram]] = {}

    def answered(self, route: Route | None, status: int, seconds: float) -> None:
        """Count one request. Labels come from the table of routes, never from a client; None is
        for requests that no route answers."""
        children = self._children.get((route, status))
        if children is None:
            method, path = (route.method, route.path) if route else ("other", "other")
            children = self._children[route, status] = (
                self._requests.labels(method, path, str(status)),
                self._seconds.labels(path),
            )
        children[0].inc()
        children[1].observe(seconds)

    def render(self) -> Document:
        """Render all metrics as text."""
        return Document(generate_latest(self._registry), CONTENT_TYPE_LATEST)
