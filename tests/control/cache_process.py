"""A process that holds chunks and announces them: ``python cache_process.py URL INSTANCE``."""

from __future__ import annotations

import secrets
import signal
import sys

from lmcache_kit.agent.agent import Agent
from tests.control.fakes import NAMESPACE, FakeTier, chunks_of

TOKENS = list(range(12))


def main() -> None:
    url, instance_id = sys.argv[1:]
    engine = FakeTier()
    engine.store(chunks_of(TOKENS))
    agent = Agent(
        [engine],
        url=url,
        instance_id=instance_id,
        incarnation=secrets.token_bytes(16),
        heartbeat_s=0.3,
    )
    agent.register_worker(0)
    agent.register_namespace(NAMESPACE)
    agent.start()
    signal.sigwait({signal.SIGTERM})
    agent.stop()


if __name__ == "__main__":
    main()
