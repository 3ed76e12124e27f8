"""Plugin hooks: the codec ``cachegen`` and the commands ``lmcache-kit cachegen``."""

from __future__ import annotations

from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import CodecSpec, CommandSpec


@hookimpl
def register_codecs() -> list[CodecSpec]:
    return [
        CodecSpec(
            name="cachegen",
            target="lmcache_kit_cachegen.codec:CacheGenCodec",
            summary="quantised and entropy-coded KV, four levels from lossless to compact",
            config="lmcache_kit_cachegen.options:CacheGenOptions",
            capabilities=frozenset({"lossless", "profiles"}),
        )
    ]


@hookimpl
def register_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="cachegen",
            target="lmcache_kit_cachegen.command:command",
            summary="make and show profiles of the codec cachegen",
        )
    ]
