"""Metrics, each declared once: name, kind, unit, help, labels and owner.

Every owner declares its metrics in a :class:`MetricSet`. Counters start at the declaration,
Prometheus gets its HELP from it, and docs/metrics.md is made from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

MetricKind: TypeAlias = Literal["counter", "gauge", "histogram"]
Unit: TypeAlias = Literal[
    "",
    "bytes",
    "chunks",
    "tokens",
    "keys",
    "seconds",
    "ratio",
    "requests",
    "messages",
    "operations",
]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    ``name`` ends in ``_total`` for a counter, which only grows while its process lives. ``unit``
    is what is counted or measured, empty for plain events. ``labels`` are label names, such as
    ``location``.
    """

    name: str
    kind: MetricKind
    unit: Unit
    help: str
    labels: tuple[str, ...] = ()


class Sample(NamedTuple):
    """The value of a metric at one time."""

    spec: MetricSpec
    value: float


@dataclass(frozen=True, slots=True)
class MetricSet:
    """The metrics of one owner.

    ``prefix`` is put before each name where metrics of several owners meet.
    """

    owner: str
    prefix: str
    specs: tuple[MetricSpec, ...]
    by_name: Mapping[str, MetricSpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name = {spec.name: spec for spec in self.specs}
        if len(by_name) < len(self.specs):
            raise ValueError(f"{self.owner} declares a metric twice")
        object.__setattr__(self, "by_name", by_name)

    def __iter__(self) -> Iterator[MetricSpec]:
        return iter(self.specs)

    def counters(self) -> Counter[str]:
        """Return all counters of this set, at zero."""
        return Counter({spec.name: 0 for spec in self.specs if spec.kind == "counter"})

    def samples(self, values: Mapping[str, float]) -> Iterable[Sample]:
        """Yield a sample for each of ``values``. Raises KeyError for an undeclared name."""
        for name, value in values.items():
            yield Sample(self.by_name[name], value)


def counter(name: str, unit: Unit, help: str, labels: tuple[str, ...] = ()) -> MetricSpec:
    """Declare a counter."""
    if not name.endswith("_total"):
        raise ValueError(f"counter {name!r} does not end in _total")
    return MetricSpec(name, "counter", unit, help, labels)


def gauge(name: str, unit: Unit, help: str, labels: tuple[str, ...] = ()) -> MetricSpec:
    """Declare a gauge."""
    if name.endswith("_total"):
        raise ValueError(f"gauge {name!r} ends in _total")
    return MetricSpec(name, "gauge", unit, help, labels)
