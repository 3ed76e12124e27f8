"""The codec and its plugin keep the kit's contracts."""

from __future__ import annotations

import struct
import zlib

import pytest

from lmcache_kit.testing import CodecSuite, PluginSuite


class _CacheGen(CodecSuite):
    __test__ = False
    level = 0

    @pytest.fixture
    def codec(self, codec_of):
        return codec_of(self.level)

    def of_another_version(self, blob):
        """The header ends with a CRC-32 of itself."""
        nbytes = struct.unpack_from("<I", blob, 6)[0]
        head = blob[:4] + struct.pack("<H", 99) + blob[6 : nbytes - 4]
        return head + struct.pack("<I", zlib.crc32(head)) + blob[nbytes:]


class TestLossless(_CacheGen):
    pass


class TestDefault(_CacheGen):
    level = 2
    lossless = False
    max_error = 0.2


class TestCompact(_CacheGen):
    level = 3
    lossless = False
    max_error = 0.3


class TestPlugin(PluginSuite):
    distribution = "lmcache-kit-cachegen"
