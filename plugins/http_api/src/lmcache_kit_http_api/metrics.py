"""Metrics in Prometheus' text format, in a registry of our own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from lmcache_kit.interfaces.frontend import ControllerAPI
from lmcache_kit_http_api.handlers import Document
from lmcache_kit_http_api.routes import Route

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)


class _ControllerCounters(Collector):
    def __init__(self, controller: ControllerAPI) -> None:
        self._controller = controller

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known only when asked for."""
        return ()

    def collect(self) -> Iterable[Metric]:
        for name, value in sorted(self._controller.counters().items()):
            full = "lmcache_kit_controller_" + name
            shown = f"Controller: {name.removesuffix('_total').replace('_', ' ')}."
            if name.endswith("_total"):
                yield CounterMetricFamily(full, shown, value=value)
            else:
                yield GaugeMetricFamily(full, shown, value=value)


class HttpMetrics:
    """Counts requests, and shows the controller's counters beside them."""

    def __init__(self, controller: ControllerAPI) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_ControllerCounters(controller))
        self._requests = Counter(
            "lmcache_kit_http_requests",
            "REST requests answered.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "lmcache_kit_http_request_seconds",
            "Time from a request's head to its reply.",
            ["route"],
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
