"""``lmcache-kit new-plugin``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from lmcache_kit.cli.output import load_plugins
from lmcache_kit.scaffold import KINDS, Project, ScaffoldError, check_free, render


@click.command("new-plugin")
@click.argument("kind", metavar=f"{{{'|'.join(KINDS)}}}")
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=".",
    show_default=True,
    help="Make the plugin's folder in this one.",
)
@click.option("--name", "offer", default="", help="What configurations call it; default: NAME.")
@click.option("--distribution", default="", help="What pip calls it; default: NAME.")
def new_plugin(kind: str, name: str, into: Path, offer: str, distribution: str) -> None:
    """Make a plugin to start from: a distribution that builds, installs and passes its tests.

    What it does is simple, and complete. Replace what is marked REPLACE, and keep the tests green.

    \b
    Examples:
      lmcache-kit new-plugin backend acme-store
      lmcache-kit new-plugin codec acme-zip
      lmcache-kit new-plugin transport acme-wire --into ~/plugins
      lmcache-kit new-plugin frontend lines --distribution acme-lines
    """
    project = Project.named(kind, name, distribution=distribution, offer=offer)
    check_free(project, load_plugins())
    folder = into / project.distribution
    try:
        made = render(kind, name, folder, distribution=distribution, offer=offer)
    except OSError as error:
        raise ScaffoldError(
            f"{folder} cannot be made: {error.strerror or error}",
            hint="Choose another place with --into",
        ) from error
    click.echo(f"The {kind} {project.offer!r} is in {folder}:")
    for path in made:
        click.echo(f"  {path.relative_to(folder)}")
    click.echo("Next:")
    click.echo(f"  cd {shlex.quote(str(folder))}")
    click.echo("  pip install --editable '.[test]'")
    click.echo("  pytest")
