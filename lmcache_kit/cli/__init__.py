"""The command line: ``lmcache-kit`` and ``lmcache_controller``.

1. A subcommand is imported when it runs, so that ``--help`` stays quick.
2. An error of the kit is one line on the standard error that says what to do, never a traceback.
3. Tables on a terminal, plain columns in a pipe, one JSON document with ``--json``.
4. Defaults and names come from the configuration's declarations and from plugins.
"""

from __future__ import annotations


def main() -> None:
    """Run ``lmcache-kit``."""
    from lmcache_kit.cli.app import app

    app(prog_name="lmcache-kit")


def controller_main() -> None:
    """Run ``lmcache_controller``, the name that LMCache gives the controller."""
    from lmcache_kit.cli.app import run_alone

    run_alone("controller", prog_name="lmcache_controller")
