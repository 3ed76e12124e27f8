"""``lmcache-kit cachegen``."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def command() -> None:
    """Make and show profiles of the codec cachegen."""


@command.command()
@click.argument("model")
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="A file of text as the model will see it; may be repeated. Without one, "
    "documentation and sources of Python's standard library are taken.",
)
@click.option("--out", type=click.Path(dir_okay=False), help="Where to write; <model's name>.lkcp.")
@click.option(
    "--context",
    default=1024,
    show_default=True,
    type=click.IntRange(32, 65536),
    help="Tokens of a text whose KV is measured.",
)
@click.option(
    "--ahead",
    default=256,
    show_default=True,
    type=click.IntRange(8, 4096),
    help="Tokens after them, in which the effect of an error is measured.",
)
@click.option(
    "--rope-style",
    default="neox",
    type=click.Choice(["neox", "gptj", "none"]),
    show_default=True,
    help="Which values of K the model turns together.",
)
def profile(
    *,
    model: str,
    texts: tuple[str, ...],
    out: str | None,
    context: int,
    ahead: int,
    rope_style: str,
) -> None:
    """Measure the KV of MODEL, a folder or a name on the Hugging Face hub, and write a profile.

    Needs torch and transformers. Takes about as long as training on the texts once.

    \b
    Example:
      lmcache-kit cachegen profile ./SmolLM2-135M-Instruct --out smollm2.lkcp
    """
    from lmcache_kit_cachegen.measuring import Measuring, default_texts

    read = [Path(text).read_text(encoding="utf-8", errors="replace") for text in texts]
    measuring = Measuring(model, context=context, ahead=ahead, rope_style=rope_style)
    with click.progressbar(read or default_texts(), label="texts") as progress:
        for text in progress:
            measuring.add(text)
    made = measuring.profile()
    path = Path(out or f"{Path(model).name}.lkcp")
    path.write_bytes(made.to_bytes())
    click.echo(f"{path}: profile {made.name.hex()} from {measuring.texts} texts")


@command.command()
@click.argument("file", type=click.Path())
def show(file: str) -> None:
    """Show what the profile FILE is of."""
    from lmcache_kit_cachegen.profile import load_profile

    loaded = load_profile(file)
    turned = f"{loaded.rope.rotary_dim} values ({loaded.rope.style})" if loaded.rope else "none"
    click.echo(f"profile  {loaded.name.hex()}")
    click.echo(f"model    {loaded.model}")
    click.echo(f"layout   {loaded.layers} layers, {loaded.kv_heads} KV heads of {loaded.head_dim}")
    click.echo(f"rotary   {turned}")
