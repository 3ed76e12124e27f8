"""The command line: ``lmcache-kit`` and ``lmcache_controller``.

Each subcommand's module is imported when it runs, so that ``--help`` stays quick.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of ``lmcache-kit``."""
    from lmcache_kit.cli.app import app

    app(prog_name="lmcache-kit")


def controller_main() -> None:
    """Entry point of ``lmcache_controller``, the name that LMCache gave it."""
    from lmcache_kit.cli.app import run_alone

    run_alone("controller", prog_name="lmcache_controller")
