"""The plugin as the kit sees it."""

from __future__ import annotations

import sys
import threading

import pytest
from click.testing import CliRunner
from lmcache_kit_cachegen import jit, profiler
from lmcache_kit_cachegen.codec import CacheGenCodec
from lmcache_kit_cachegen.command import command
from lmcache_kit_cachegen.options import CacheGenOptions
from pydantic import ValidationError

from lmcache_kit.errors import ConfigError
from lmcache_kit.interfaces import ChunkInfo, Codec
from lmcache_kit.plugins import Plugins
from tests.support.processes import run_python

from .conftest import ROPE, layout, payload_of, round_trip


def test_the_kit_finds_the_codec_by_name():
    found = Plugins.load().resolve("codec", "cachegen")
    assert issubclass(found, Codec)
    assert isinstance(found(), CacheGenCodec)


def test_listing_plugins_imports_nothing_heavy():
    code = """
        import sys
        from lmcache_kit_cachegen import plugin
        assert plugin.register_codecs()[0].name == "cachegen"
        heavy = {"numba", "numpy", "torch", "zstandard", "pydantic", "click"} & set(sys.modules)
        assert not heavy, heavy
    """
    run_python(code)


def test_coding_needs_no_torch():
    code = """
        import sys
        sys.modules["torch"] = None
        from lmcache_kit_cachegen.codec import CacheGenCodec
        CacheGenCodec().warm_up()
        assert not {"transformers", "vllm"} & set(sys.modules)
    """
    run_python(code)


@pytest.mark.parametrize("wrong", [{"level": 4}, {"coder": "x"}, {"threads": 0}, {"levels": 1}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        CacheGenOptions(**wrong)


def test_kernels_work_where_numba_may_not_write_a_cache(monkeypatch):
    asked = []

    def refusing(function):
        asked.append(function.__name__)
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(jit, "_OptionalCache", refusing)

    @jit.jit
    def twice(x):
        return 2 * x

    assert twice(4) == 8
    assert asked == ["twice"]


def test_one_codec_serves_many_threads(codec_of):
    chunk = ChunkInfo(layout(layers=4), tokens=100, start=5, rope=ROPE)
    payloads = [payload_of(chunk, seed) for seed in range(4)]
    codec = codec_of()
    wanted = [round_trip(codec, payload, chunk) for payload in payloads]
    wrong = []

    def work(number: int) -> None:
        for _ in range(10):
            if round_trip(codec, payloads[number], chunk) != wanted[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_is_left_to_compile_after_warming_up(profile, tmp_path):
    """Whatever the dtype, the level, the shape, the coder and the kind of memory."""
    path = tmp_path / "made-up.lkcp"
    path.write_bytes(profile.to_bytes())
    code = f"""
        import itertools
        import numpy as np
        from lmcache_kit.interfaces import ChunkInfo, Rope
        from lmcache_kit.layout import KVLayout
        from lmcache_kit_cachegen import kernels, rans
        from lmcache_kit_cachegen.codec import CacheGenCodec
        from lmcache_kit_cachegen.options import CacheGenOptions

        def compiled():
            found = [*vars(kernels).values(), *vars(rans).values()]
            return sum(len(each.signatures) for each in found if hasattr(each, "signatures"))

        CacheGenCodec().warm_up()
        before = compiled()
        assert before > 10
        styles = (None, Rope(16), Rope(8, style="gptj"), Rope(16, base=10000.0))
        for dtype, level, coder, rope, tokens, start, profiles in itertools.product(
            ("bfloat16", "float16", "float32"), (0, 1, 2, 3), ("rans", "zstd"), styles,
            (1, 2, 60), (0, 7), ((), ({str(path)!r},)),
        ):
            chunk = ChunkInfo(KVLayout(dtype, 2, 2, 16), tokens, start, rope)
            values = np.random.default_rng(0).normal(size=128 * tokens).astype("<f4")
            words = (values.view("<u4") >> 16).astype("<u2")
            same = {{"bfloat16": words, "float16": values.astype("<f2"), "float32": values}}
            payload = same[dtype].tobytes()
            codec = CacheGenCodec(CacheGenOptions(level=level, coder=coder, profiles=profiles))
            for data in (payload, memoryview(bytearray(payload))):
                blob = codec.encode(data, chunk)
                codec.decode(blob, chunk, bytearray(chunk.payload_bytes))
        chunk = ChunkInfo(KVLayout("bfloat16", 1, 3, 5), 33)
        codec = CacheGenCodec()
        payload = (np.random.default_rng(0).normal(size=990).astype("<f4").view("<u4") >> 16)
        payload = payload.astype("<u2").tobytes()
        codec.decode(codec.encode(payload, chunk), chunk, bytearray(chunk.payload_bytes))
        assert compiled() == before, (before, compiled())
    """
    run_python(code)


def test_show_says_what_a_profile_is_of(profile, tmp_path):
    path = tmp_path / "made-up.lkcp"
    path.write_bytes(profile.to_bytes())
    shown = CliRunner().invoke(command, ["show", str(path)])
    assert shown.exit_code == 0
    assert profile.name.hex() in shown.output
    assert "2 layers, 2 KV heads of 16" in shown.output
    assert "16 values (neox)" in shown.output


@pytest.mark.parametrize("absent", ["torch", "transformers"])
def test_making_a_profile_says_what_is_missing(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    if absent == "transformers":
        monkeypatch.setitem(sys.modules, "torch", sys)
    with pytest.raises(ConfigError, match=rf"needs {absent}.*pip install .*\[profile\]"):
        profiler.Profiler("model", context=32, ahead=8, rope_style="neox")
