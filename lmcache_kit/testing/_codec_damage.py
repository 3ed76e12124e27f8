"""The codecs' suite, part two: damaged blobs, blobs of other chunks, buffers of wrong size."""

from __future__ import annotations

import random

import msgspec
import pytest

from lmcache_kit.errors import BlobMismatch, CodecError, CorruptBlob, UnknownVersion
from lmcache_kit.interfaces import ChunkInfo, Codec
from lmcache_kit.interfaces.codec import Buffer
from lmcache_kit.layout import KVLayout
from lmcache_kit.testing._bytes import Bytes
from lmcache_kit.testing.payloads import LAYOUTS, chunk_of, kv_like
from lmcache_kit.testing.suite import Suite

_UNTOUCHED = 0x5A
_MOST_DAMAGES = 400
_SMALL = ChunkInfo(KVLayout("bfloat16", layers=2, kv_heads=2, head_dim=8), tokens=20, start=40)

others = pytest.mark.parametrize(
    "other",
    [
        msgspec.structs.replace(_SMALL, tokens=19),
        msgspec.structs.replace(_SMALL, tokens=21),
        msgspec.structs.replace(_SMALL, start=41),
        msgspec.structs.replace(_SMALL, layout=KVLayout("float16", 2, 2, 8)),
        msgspec.structs.replace(_SMALL, layout=KVLayout("bfloat16", 2, 1, 16)),
        msgspec.structs.replace(_SMALL, layout=KVLayout("bfloat16", 1, 4, 8)),
        msgspec.structs.replace(_SMALL, layout=KVLayout("bfloat16", 4, 1, 16, "mla")),
    ],
    ids=["fewer tokens", "more tokens", "place", "dtype", "heads", "layers", "kind"],
)


class RefusingTests(Suite):
    """Part of :class:`~lmcache_kit.testing.CodecSuite`: refusals."""

    @pytest.fixture
    def codec(self) -> Codec:
        self.missing(
            "the fixture 'codec'",
            """
            @pytest.fixture
            def codec(self):
                return MyCodec()
            """,
        )

    def of_another_version(self, blob: bytes) -> bytes | None:
        """Return the blob with another format version in its header and all checksums correct.

        Define this to enable the tests of unknown versions.
        """
        return None

    # Damaged blobs.

    def test_every_cut_is_noticed(self, codec: Codec) -> None:
        blob = self._blob(codec)
        step = max(1, len(blob) // _MOST_DAMAGES)
        for length in {*range(0, len(blob), step), len(blob) - 1}:
            self.refused(codec, blob[:length], what=f"the first {length} of {len(blob)} bytes")

    def test_every_flipped_bit_is_noticed(self, codec: Codec) -> None:
        """All bits of the first bytes, where headers are, and a sample of the others.

        A bit that makes the blob look like another version or chunk may be refused as such.
        """
        blob = self._blob(codec)
        bits = range(8 * len(blob))
        rest = random.Random(0).sample(bits, min(_MOST_DAMAGES, len(bits)))
        for bit in {*bits[: 8 * 64], *rest}:
            damaged = bytearray(blob)
            damaged[bit // 8] ^= 1 << bit % 8
            what = f"bit {bit} of {8 * len(blob)} flipped"
            self.refused(codec, damaged, error=CodecError, what=what)

    def test_bytes_that_are_swapped_or_lost_are_noticed(self, codec: Codec) -> None:
        blob = self._blob(codec)
        half, end = len(blob) // 2, len(blob)
        for what, damaged in (
            ("one byte lost in the middle", blob[:half] + blob[half + 1 :]),
            ("one byte more in the middle", blob[:half] + b"\xa5" + blob[half:]),
            ("the last half zero", blob[:half] + bytes(end - half)),
            ("the halves swapped", blob[half:] + blob[:half]),
        ):
            self.refused(codec, damaged, error=CodecError, what=what)

    def test_more_bytes_at_the_end_are_noticed(self, codec: Codec) -> None:
        blob = self._blob(codec)
        for more in (b"\0", b"\xff" * 100, blob):
            self.refused(codec, blob + more, what=f"{len(more)} bytes more")

    def test_noise_is_refused(self, codec: Codec) -> None:
        for seed in range(50):
            draw = random.Random(seed)
            noise = draw.randbytes(draw.choice([1, 16, 300]))
            self.refused(codec, noise, error=CodecError, what="noise")
        self.refused(codec, b"", error=CodecError, what="nothing")
        self.refused(codec, bytes(1000), error=CodecError, what="zeros")

    def test_describe_refuses_what_decode_refuses(self, codec: Codec) -> None:
        for bad in (b"", b"\0", bytes(1000), random.Random(0).randbytes(300)):
            with pytest.raises(CodecError):
                codec.describe(bad)
        with pytest.raises(CodecError):
            codec.describe(self._blob(codec)[:3])

    def test_another_version_is_refused_by_name(self, codec: Codec) -> None:
        blob = self.of_another_version(self._blob(codec))
        if blob is None:
            pytest.skip("of_another_version() is not defined")
        self.refused(codec, blob, error=UnknownVersion, what="another version")
        with pytest.raises(UnknownVersion):
            codec.describe(blob)

    @others
    def test_a_blob_of_another_chunk_is_refused(self, codec: Codec, other: ChunkInfo) -> None:
        blob = self._blob(codec)
        self.refused(codec, blob, chunk=other, error=BlobMismatch, what=f"read as {other}")

    def test_after_a_refusal_it_decodes_as_before(self, codec: Codec) -> None:
        blob = self._blob(codec)
        out = [bytearray(_SMALL.payload_bytes) for _ in range(2)]
        codec.decode(blob, _SMALL, out[0])
        self.refused(codec, blob[:-1], what="a cut blob")
        codec.decode(blob, _SMALL, out[1])
        assert Bytes(out[0]) == Bytes(out[1])

    # Buffers that do not fit.

    def test_a_payload_of_another_length_is_refused(self, codec: Codec) -> None:
        for layout in LAYOUTS:
            chunk = chunk_of(layout)
            payload = kv_like(chunk)
            for wrong in (payload[:-1], payload + b"\0", b"", payload + payload):
                with pytest.raises(ValueError):  # noqa: PT011 - any message will do
                    codec.encode(wrong, chunk)

    def test_an_out_of_another_length_is_refused(self, codec: Codec) -> None:
        blob = self._blob(codec)
        for more in (-1, 1, _SMALL.payload_bytes):
            out = bytearray([_UNTOUCHED]) * (_SMALL.payload_bytes + more)
            with pytest.raises(ValueError):  # noqa: PT011 - any message will do
                codec.decode(blob, _SMALL, out)
            assert not out.strip(bytes([_UNTOUCHED])), "decode wrote into an out of wrong size"

    def test_an_out_that_cannot_be_written_is_refused(self, codec: Codec) -> None:
        with pytest.raises((ValueError, TypeError)):
            codec.decode(self._blob(codec), _SMALL, bytes(_SMALL.payload_bytes))

    # Helpers.

    def refused(
        self,
        codec: Codec,
        blob: Buffer,
        *,
        what: str,
        chunk: ChunkInfo = _SMALL,
        error: type[CodecError] = CorruptBlob,
    ) -> None:
        """Fail unless decoding raises ``error`` and leaves ``out`` unchanged."""
        out = bytearray([_UNTOUCHED]) * chunk.payload_bytes
        try:
            codec.decode(blob, chunk, out)
        except error:
            pass
        except Exception as other:
            name = type(other).__name__
            raise AssertionError(f"{what}: {name} instead of {error.__name__}: {other}") from other
        else:
            pytest.fail(f"{what}: decoded as if nothing were wrong")
        assert not out.strip(bytes([_UNTOUCHED])), f"{what}: refused after writing into out"

    def _blob(self, codec: Codec) -> bytes:
        return codec.encode(kv_like(_SMALL), _SMALL)
