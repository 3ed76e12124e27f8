"""The commands ``lmcache-kit cachegen profile`` and ``lmcache-kit cachegen show``."""

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
    help="A file of text like the model's prompts; may be repeated. Default: documentation and "
    "sources of Python's standard library.",
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
    help="Tokens after the context, on which the effect of an error is measured.",
)
@click.option(
    "--rope-style",
    default="neox",
    type=click.Choice(["neox", "gptj", "none"]),
    show_default=True,
    help="Which values of K the model's rotary embedding pairs.",
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

    Needs torch and transformers. Takes about as long as one epoch of training on the texts.

    \b
    Example:
      lmcache-kit cachegen profile ./SmolLM2-135M-Instruct --out smollm2.lkcp
    """
    from lmcache_kit_cachegen.profiler import Profiler, default_texts

    read = [Path(text).read_text(encoding="utf-8", errors="replace") for text in texts]
    profiler = Profiler(model, context=context, ahead=ahead, rope_style=rope_style)
    with click.progressbar(read or default_texts(), label="texts") as progress:
        for text in progress:
            profiler.add(text)
    made = profiler.profile()
    path = Path(out or f"{Path(model).name}.lkcp")
    path.write_bytes(made.to_bytes())
    click.echo(f"{path}: profile {made.name.hex()} from {profiler.texts} texts")


@command.command()
@click.argument("file", type=click.Path())
def show(file: str) -> None:
    """Show the model and the shapes of the profile FILE."""
    from lmcache_kit_cachegen.profile import load_profile

    loaded = load_profile(file)
    rotated = f"{loaded.rope.rotary_dim} values ({loaded.rope.style})" if loaded.rope else "none"
    click.echo(f"profile  {loaded.name.hex()}")
    click.echo(f"model    {loaded.model}")
    click.echo(f"layout   {loaded.layers} layers, {loaded.kv_heads} KV heads of {loaded.head_dim}")
    click.echo(f"rotary   {rotated}")
