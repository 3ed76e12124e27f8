"""A codec that is right, and many that are wrong in one thing each.

``CAUGHT_BY``: the check of the suite that is there for it.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from hashlib import blake2b

import msgspec
import pytest
from pickling_codec import Pickling

from lmcache_kit.errors import BlobMismatch, CorruptBlob, UnknownVersion
from lmcache_kit.interfaces import BlobInfo, Codec
from lmcache_kit.testing import CodecSuite

HEAD = struct.Struct("<4sBI16sI")


def name_of(chunk):
    return blake2b(msgspec.msgpack.encode(chunk), digest_size=16).digest()


class Right(Codec):
    """A header, and the payload deflated; the CRC is of all that follows the version."""

    format_version = 1

    def encode(self, payload, chunk):
        self.check(payload, chunk)
        data = self.squeeze(payload)
        return self.join(self.name(chunk), chunk.payload_bytes, data)

    def decode(self, blob, chunk, out):
        name, nbytes, data = self.take_apart(blob)
        if name != self.name(chunk):
            raise BlobMismatch("of another chunk")
        if memoryview(out).nbytes != nbytes:
            raise ValueError("out has another length")
        memoryview(out)[:] = self.unsqueeze(data)

    def describe(self, blob):
        _, nbytes, _ = self.take_apart(blob)
        return BlobInfo(self.format_version, 0, nbytes, memoryview(blob).nbytes)

    def max_blob_bytes(self, chunk):
        return chunk.payload_bytes + chunk.payload_bytes // 1000 + 64

    def name(self, chunk):
        return name_of(chunk)

    def check(self, payload, chunk):
        if memoryview(payload).nbytes != chunk.payload_bytes:
            raise ValueError("payload has another length")

    def squeeze(self, payload):
        return zlib.compress(payload, 1)

    def unsqueeze(self, data):
        return zlib.decompress(data)

    def join(self, name, nbytes, data):
        rest = struct.pack("<16sI", name, nbytes) + data
        return struct.pack("<4sBI", b"TEST", 1, zlib.crc32(rest)) + rest

    def take_apart(self, blob):
        blob = bytes(blob)
        if len(blob) < HEAD.size or blob[:4] != b"TEST":
            raise CorruptBlob("no blob")
        if blob[4] != 1:
            raise UnknownVersion(f"version {blob[4]}")
        _, _, crc, name, nbytes = HEAD.unpack_from(blob)
        if zlib.crc32(blob[9:]) != crc:
            raise CorruptBlob("damaged")
        return name, nbytes, blob[HEAD.size :]


class AcceptsDamage(Right):
    def squeeze(self, payload):
        return bytes(payload)

    def unsqueeze(self, data):
        return data

    def take_apart(self, blob):
        if len(blob) < HEAD.size or bytes(blob[:4]) != b"TEST":
            raise CorruptBlob("no blob")
        _, _, _, name, nbytes = HEAD.unpack_from(blob)
        if len(blob) != HEAD.size + nbytes:
            raise CorruptBlob("too short")
        return name, nbytes, bytes(blob[HEAD.size :])


class WritesBeforeVerifying(Right):
    def decode(self, blob, chunk, out):
        memoryview(out)[:4] = bytes(4)
        super().decode(blob, chunk, out)


class IgnoresWhatFollows(Right):
    def join(self, name, nbytes, data):
        return super().join(name, nbytes, struct.pack("<I", len(data)) + data)

    def take_apart(self, blob):
        blob = bytes(blob)
        if len(blob) >= HEAD.size + 4:
            (length,) = struct.unpack_from("<I", blob, HEAD.size)
            blob = blob[: HEAD.size + 4 + length]
        name, nbytes, data = super().take_apart(blob)
        return name, nbytes, data[4:]


class TakesAnyPlace(Right):
    def name(self, chunk):
        return name_of(msgspec.structs.replace(chunk, start=0))


class TakesAnyShape(Right):
    """All that counts is how many bytes there are."""

    def name(self, chunk):
        return struct.pack("<QQ", chunk.payload_bytes, chunk.start)


class LosesBits(Right):
    def squeeze(self, payload):
        return zlib.compress(bytes(each & 0xFE for each in bytes(payload)))


class LosesNaN(Right):
    """A NaN of two bytes becomes zero."""

    def squeeze(self, payload):
        data = bytearray(payload)
        for at in range(0, len(data) - 1, 2):
            if data[at + 1] & 0x7F == 0x7F and data[at] >= 0x80:
                data[at : at + 2] = b"\0\0"
        return zlib.compress(data)


class DisturbsThreads(Right):
    def squeeze(self, payload):
        self.scratch = bytes(payload)
        time.sleep(0.001)
        return super().squeeze(self.scratch)


class HoldsBuffers(Right):
    def encode(self, payload, chunk):
        self.last = memoryview(payload)
        return super().encode(payload, chunk)


class Underestimates(Right):
    def max_blob_bytes(self, chunk):
        return chunk.payload_bytes


class NeverTheSame(Right):
    def join(self, name, nbytes, data):
        return super().join(name, nbytes, os.urandom(8) + data)

    def unsqueeze(self, data):
        return super().unsqueeze(data[8:])


class DescribesWrongly(Right):
    def describe(self, blob):
        return msgspec.structs.replace(super().describe(blob), raw_bytes=len(blob))


class ReturnsABytearray(Right):
    def encode(self, payload, chunk):
        return bytearray(super().encode(payload, chunk))


class TakesAnyLength(Right):
    def check(self, payload, chunk):
        pass


class WantsBytes(Right):
    def encode(self, payload, chunk):
        return super().encode(payload.ljust(0), chunk)


class LeavesZerosOut(Right):
    def decode(self, blob, chunk, out):
        room = bytearray(out)
        super().decode(blob, chunk, room)
        for at, value in enumerate(room):
            if value:
                out[at] = value


class RaisesItsLibrarysErrors(Right):
    def take_apart(self, blob):
        _, _, _, name, nbytes = HEAD.unpack_from(blob)
        return name, nbytes, bytes(blob[HEAD.size :])


CAUGHT_BY = {
    AcceptsDamage: "test_every_flipped_bit_is_noticed",
    WritesBeforeVerifying: "test_every_cut_is_noticed",
    IgnoresWhatFollows: "test_more_bytes_at_the_end_are_noticed",
    TakesAnyPlace: "test_a_blob_of_another_chunk_is_refused",
    TakesAnyShape: "test_a_blob_of_another_chunk_is_refused",
    LosesBits: "test_every_layout_comes_back",
    LosesNaN: "test_any_values_come_back",
    DisturbsThreads: "test_threads_do_not_disturb_each_other",
    HoldsBuffers: "test_it_keeps_no_hold_of_the_buffers",
    Underestimates: "test_a_blob_is_never_larger_than_it_says",
    NeverTheSame: "test_encoding_is_deterministic",
    DescribesWrongly: "test_describe_agrees_with_the_blob",
    ReturnsABytearray: "test_a_blob_is_bytes_of_its_own",
    TakesAnyLength: "test_a_payload_of_another_length_is_refused",
    WantsBytes: "test_any_kind_of_buffer_will_do",
    LeavesZerosOut: "test_decoding_fills_all_of_out",
    RaisesItsLibrarysErrors: "test_noise_is_refused",
    Pickling: "test_it_does_not_unpickle",
}


def suite_of(made):
    class Made(CodecSuite):
        lossless = made is not LosesNaN
        max_error = 0.1

        @pytest.fixture
        def codec(self):
            return made()

        def of_another_version(self, blob):
            return blob[:4] + b"\x09" + blob[5:]

    Made.__name__ = Made.__qualname__ = f"Test{made.__name__}"
    return Made


globals().update({f"Test{each.__name__}": suite_of(each) for each in (Right, *CAUGHT_BY)})
