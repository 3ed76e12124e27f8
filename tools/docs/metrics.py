"""The page of metrics, made from their declarations."""

from __future__ import annotations

from lmcache_kit_http_api.metrics import HTTP

from lmcache_kit.agent.metrics import AGENT
from lmcache_kit.cache.metrics import LOWER_TIER, MEMORY
from lmcache_kit.controller.metrics import CONTROLLER
from lmcache_kit.metrics import MetricSet
from lmcache_kit.service.metrics import CACHE_PROCESS
from tools.docs.source import table

SETS = (CONTROLLER, HTTP, CACHE_PROCESS, MEMORY, LOWER_TIER, AGENT)


def page() -> dict[str, str]:
    """Return the page, by its path."""
    return {
        "reference/metrics.md": "\n\n".join(
            [
                "# Metrics, one by one",
                "Made from the declarations in the code. [Metrics](../metrics.md) says where to "
                "read them and what to watch. A counter only grows while its process lives.",
                *(part for each in SETS for part in _section(each)),
            ]
        )
    }


def _section(declared: MetricSet) -> tuple[str, str]:
    rows = [
        (
            f"`{declared.prefix}{spec.name}`",
            spec.kind,
            spec.unit,
            ", ".join(f"`{label}`" for label in spec.labels),
            spec.help,
        )
        for spec in sorted(declared, key=lambda spec: spec.name)
    ]
    heading = f"## {declared.owner.capitalize()} {{#{declared.owner.replace(' ', '-')}}}"
    return heading, table(("Name", "Kind", "Unit", "Labels", "Meaning"), rows)
