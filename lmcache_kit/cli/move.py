"""``lmcache-kit move``."""

from __future__ import annotations

from typing import Any

import click

from lmcache_kit.cli._tokens import tokens_or_all
from lmcache_kit.cli.operations import (
    everything_option,
    shared,
    submit,
    wait_option,
)
from lmcache_kit.first_party import DEFAULT_MEMORY_BACKEND


@click.command()
@click.option("--from", "source", required=True, metavar="INSTANCE", help="Where it lies.")
@click.option("--to", "destination", required=True, metavar="INSTANCE", help="Where it goes.")
@click.option(
    "--from-location", metavar="LOCATION", default=DEFAULT_MEMORY_BACKEND, show_default=True,
    help="Where in the one.",
)  # fmt: skip
@click.option(
    "--to-location", metavar="LOCATION", default=DEFAULT_MEMORY_BACKEND, show_default=True,
    help="Where in the other.",
)  # fmt: skip
@shared
@everything_option
@click.option("--copy", is_flag=True, help="Leave it where it was as well.")
@wait_option
def move(
    tokens: tuple[int, ...],
    file: str | None,
    *,
    source: str,
    destination: str,
    from_location: str,
    to_location: str,
    everything: bool,
    copy: bool,
    wait: bool,
    **options: Any,
) -> None:
    """Bring what is stored of these tokens, or everything, from one instance or location to
    another.

    The source deletes it once the destination has it and lookups find it there; whatever goes
    wrong before that, the source keeps it. Two instances need enable_p2p; from one location of an
    instance to another it goes without. TOKENS are ids, given as to `lmcache-kit lookup`.

    \b
    Examples:
      lmcache-kit move 128000 849 21435 --from gpu-1 --to gpu-2 --wait
      lmcache-kit move --file tokens.json --from gpu-1 --to gpu-2 --copy
      lmcache-kit move --all --from gpu-1 --to gpu-2 --deadline 3600
      lmcache-kit move --all --from gpu-1 --to gpu-1 --to-location LOCATION
    """
    asked = {
        "old_position": [source, from_location],
        "new_position": [destination, to_location],
        "copy": copy or None,
        **options,
    }
    word = "Copying" if copy else "Moving"
    submit("move", word, tokens_or_all(tokens, file, everything), asked, wait=wait)
