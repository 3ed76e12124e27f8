"""Metrics in Prometheus' text format, in a registry of our own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from lmcache_kit.interfaces.frontend import ControllerAPI
from lmcache_kit_http_api.operations import Raw

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
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """``method`` and ``route`` come from the table of routes, never from a client."""
        key = (method, route, status)
        children = self._children.get(key)
        if children is None:
            children = self._children[key] = (
                self._requests.labels(method, route, str(status)),
                self._seconds.labels(route),
            )
        children[0].inc()
        children[1].observe(seconds)

    def render(self) -> Raw:
        """All of it as text."""
        return Raw(generate_latest(self._registry), CONTENT_TYPE_LATEST)
