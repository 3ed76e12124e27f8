"""The suite of storage backends: single-threaded behaviour here, threads and ends beside it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces import Backend, Blob
from lmcache_kit.interfaces.backend import MAX_META_BYTES
from lmcache_kit.testing._backend_ends import EndingTests
from lmcache_kit.testing._backend_tests import Damage, bytes_of, key_of, plain, put, read_all
from lmcache_kit.testing._backend_threads import ThreadTests
from lmcache_kit.testing._bytes import Bytes

MIB = 1 << 20
ODD_KEYS = {
    "zeros": bytes(16),
    "ones": b"\xff" * 16,
    "path": b"../../../etc/abc",
    "absolute": b"/tmp/0123456789a",
    "text": b"key with  spaces",
    "glob": b"*?[a-z]:{}$\x00\n\r\\'",
    "newline": b"0123456789abcde\n",
}


class BackendSuite(ThreadTests, EndingTests):
    """Conformance of a :class:`~lmcache_kit.interfaces.Backend`.

    Define the fixture ``make_backend``: a function that opens the store of this test, and the same
    store again when it is called again. The suite closes the backends.

    ``persists``: blobs survive closing and reopening. ``bounded_bytes``: the capacity that
    ``make_backend`` sets, at least 16 MiB, or None. A ``shared`` backend is opened twice at a time.
    Define the fixture ``damage``, a function that damages the blob of a key, for a backend that
    detects damage.
    """

    # Round trips.

    def test_it_is_a_backend(self, backend: Backend) -> None:
        assert isinstance(backend, Backend)

    def test_a_new_one_is_empty(self, backend: Backend) -> None:
        self.is_empty(backend, [key_of(1), bytes(16)])
        assert list(backend.scan()) == []
        assert backend.usage().entries == 0

    @pytest.mark.parametrize("nbytes", [1, 2, 100, 4095, 4096, 4097, 100_000, 3 * MIB + 1])
    def test_a_blob_comes_back_as_it_was(self, backend: Backend, nbytes: int) -> None:
        meta, data = bytes_of(300, 1), bytes_of(nbytes)
        put(backend, key_of(1), data, meta)
        assert plain(backend.get(key_of(1))) == (meta, data)

    def test_what_comes_back_are_bytes(self, backend: Backend) -> None:
        put(backend, key_of(1), bytes_of(100))
        blob = backend.get(key_of(1))
        [stored] = backend.scan()
        assert blob is not None
        assert isinstance(blob.meta, bytes)
        if isinstance(blob, Blob):
            assert isinstance(blob.data, bytes | bytearray | memoryview)
            assert memoryview(blob.data).nbytes == len(blob.data) == 100, "its items are bytes"
        else:
            assert len(read_all(blob.file)) == 100
        assert isinstance(stored.key, bytes)
        assert isinstance(stored.meta, bytes)

    def test_a_blob_without_data_comes_back(self, backend: Backend) -> None:
        put(backend, key_of(1), b"")
        assert backend.put(key_of(2), b"m", []) is True
        assert plain(backend.get(key_of(1))) == (b"meta", b"")
        assert plain(backend.get(key_of(2))) == (b"m", b"")

    @pytest.mark.parametrize("nbytes", [0, 1, 1000, 70_000, MAX_META_BYTES])
    def test_meta_comes_back_however_long_it_is(self, backend: Backend, nbytes: int) -> None:
        meta = bytes_of(nbytes)
        put(backend, key_of(1), b"data", meta)
        assert plain(backend.get(key_of(1))) == (meta, b"data")
        assert [stored.meta for stored in backend.scan()] == [meta]

    def test_pieces_are_joined_in_their_order(self, backend: Backend) -> None:
        whole = bytes_of(100_000)
        cuts = [0, 1, 1, 40_000, 40_001, 100_000]
        pieces = [memoryview(whole)[start:end] for start, end in pairwise(cuts)]
        assert backend.put(key_of(1), b"meta", pieces) is True
        assert plain(backend.get(key_of(1))) == (b"meta", whole)

    def test_a_blob_stays_when_the_memory_it_came_from_is_used_again(
        self, backend: Backend
    ) -> None:
        source = bytearray(bytes_of(50_000))
        before = Bytes(source)
        backend.put(key_of(1), b"meta", [memoryview(source)])
        source[:] = bytes(len(source))
        assert plain(backend.get(key_of(1))) == (b"meta", before)

    def test_the_memory_it_comes_from_stays_as_it_is(self, backend: Backend) -> None:
        source = bytearray(bytes_of(50_000))
        backend.put(key_of(1), b"meta", [memoryview(source)])
        assert Bytes(source) == bytes_of(50_000)
        source.append(1)  # raises BufferError if the backend still holds a view

    def test_large_blobs_come_back(self, backend: Backend) -> None:
        nbytes = min(40 * MIB, (self.bounded_bytes or 48 * MIB) - 4 * MIB)
        data = Bytes(bytes_of(MIB) * (nbytes // MIB))
        put(backend, key_of(1), data)
        assert plain(backend.get(key_of(1))) == (b"meta", data)

    def test_what_is_put_again_takes_the_place_of_what_was_there(self, backend: Backend) -> None:
        for nbytes, meta in ((50_000, b"first"), (10, b"second"), (70_000, b""), (0, b"last")):
            put(backend, key_of(1), bytes_of(nbytes), meta)
            assert plain(backend.get(key_of(1))) == (meta, bytes_of(nbytes))
        assert [stored.key for stored in backend.scan()] == [key_of(1)]
        assert backend.usage().entries == 1

    def test_what_is_not_there_is_none(self, backend: Backend) -> None:
        put(backend, key_of(1), b"data")
        assert backend.get(key_of(2)) is None

    # Keys.

    @pytest.mark.parametrize("key", ODD_KEYS.values(), ids=ODD_KEYS)
    def test_any_16_bytes_are_a_key(self, backend: Backend, key: bytes) -> None:
        put(backend, key, b"data")
        assert plain(backend.get(key)) == (b"meta", b"data")
        assert [stored.key for stored in backend.scan()] == [key]
        backend.remove([key])
        self.is_empty(backend, [key])

    def test_keys_that_differ_in_a_bit_are_others(self, backend: Backend) -> None:
        first = key_of(1)
        others = [
            bytes([*first[:at], first[at] ^ bit, *first[at + 1 :]])
            for at in range(16)
            for bit in (0x01, 0x20, 0x80)
        ]
        for number, key in enumerate(others):
            put(backend, key, b"%d" % number)
        assert backend.contains([first, *others]) == [False] + [True] * len(others)
        for number, key in enumerate(others):
            assert plain(backend.get(key)) == (b"meta", b"%d" % number)

    # Many.

    def test_contains_answers_for_each_key_in_order(self, backend: Backend) -> None:
        for number in (1, 3, 5):
            put(backend, key_of(number), b"data")
        asked = [5, 2, 1, 1, 4, 3, 2]
        answer = backend.contains([key_of(number) for number in asked])
        assert answer == [True, False, True, True, False, True, False]
        assert backend.contains([]) == []

    def test_contains_answers_for_thousands_of_keys_at_once(self, backend: Backend) -> None:
        there = {number * 97 for number in range(20)}
        for number in there:
            put(backend, key_of(number), bytes_of(20_000))
        asked = range(5000)
        keys = [key_of(number) for number in asked]
        answer = self.within(lambda: backend.contains(keys), what="contains() of 5000 keys")
        assert len(answer) == len(keys)
        wrong = [number for number in asked if answer[number] != (number in there)]
        assert not wrong, f"wrong about {len(wrong)} of {len(keys)} keys, the first is {wrong[0]}"

    def test_what_is_removed_is_gone_and_the_rest_stays(self, backend: Backend) -> None:
        for number in range(10):
            put(backend, key_of(number), bytes_of(1000, number))
        gone = [key_of(number) for number in (0, 3, 9)]
        backend.remove(gone)
        self.is_empty(backend, gone)
        assert backend.usage().entries == 7
        for number in (1, 2, 4, 5, 6, 7, 8):
            assert plain(backend.get(key_of(number))) == (b"meta", bytes_of(1000, number))

    def test_removing_what_is_not_there_is_passed_over(self, backend: Backend) -> None:
        put(backend, key_of(1), b"data")
        backend.remove([])
        backend.remove([key_of(2), key_of(1), key_of(1), key_of(3)])
        backend.remove([key_of(1)])
        assert backend.usage().entries == 0

    def test_what_was_removed_can_be_put_again(self, backend: Backend) -> None:
        put(backend, key_of(1), b"old")
        backend.remove([key_of(1)])
        put(backend, key_of(1), b"new")
        assert plain(backend.get(key_of(1))) == (b"meta", b"new")

    def test_scan_tells_each_blob_once(self, backend: Backend) -> None:
        wanted = dict[bytes, tuple[bytes, int]]()
        for number in range(300):
            meta, data = bytes_of(number % 50, number), bytes_of(number * 7, number)
            put(backend, key_of(number), data, meta)
            wanted[key_of(number)] = (meta, len(data))
        put(backend, key_of(7), b"again", b"other")
        wanted[key_of(7)] = (b"other", 5)
        backend.remove([key_of(8)])
        del wanted[key_of(8)]
        found = list(backend.scan())
        assert len(found) == len(wanted)
        assert {each.key: (each.meta, each.nbytes) for each in found} == wanted

    def test_scans_do_not_disturb_each_other(self, backend: Backend) -> None:
        for number in range(20):
            put(backend, key_of(number), b"data")

        def scan_twice() -> tuple[int, int]:
            one, other = iter(backend.scan()), iter(backend.scan())
            next(one)
            return len(list(other)), len(list(one))

        assert self.within(scan_twice, what="a scan during another") == (20, 19)

    # Capacity.

    def test_usage_counts(self, backend: Backend) -> None:
        total = 0
        for number in range(10):
            put(backend, key_of(number), bytes_of(10_000 * number))
            total += 10_000 * number
            usage = backend.usage()
            assert usage.entries == number + 1
            assert usage.nbytes >= total
        put(backend, key_of(9), bytes_of(5))
        assert backend.usage().entries == 10
        backend.remove([key_of(number) for number in range(10)])
        assert backend.usage().entries == 0

    def test_room_comes_back_with_what_is_removed(self, backend: Backend) -> None:
        capacity = self.needs_bound()
        number, left = 0, list[int]()
        for _ in range(3):
            while backend.put(key_of(number), b"meta", [memoryview(bytes(MIB))]):
                number += 1
                assert number * MIB <= 4 * capacity, "more was put than the capacity"
            there = [stored.key for stored in backend.scan()]
            assert there, "put() refused the first blob"
            backend.remove(there)
            assert backend.usage().entries == 0
            left.append(backend.usage().nbytes)
        assert left[2] <= left[0], "usage() of an empty store grows with each round"

    def test_what_does_not_fit_is_refused_and_changes_nothing(self, backend: Backend) -> None:
        capacity = self.needs_bound()
        put(backend, key_of(1), bytes_of(MIB))
        for key in (key_of(1), key_of(2)):
            for nbytes in (capacity + 1, capacity - MIB // 2 if key == key_of(2) else 2 * capacity):
                assert backend.put(key, b"meta", [memoryview(bytes(nbytes))]) is False
        assert plain(backend.get(key_of(1))) == (b"meta", bytes_of(MIB))
        assert backend.contains([key_of(1), key_of(2)]) == [True, False]
        assert backend.usage().entries == 1

    def test_it_never_takes_more_room_than_it_has(self, backend: Backend) -> None:
        self.needs_bound()
        for number in range(200):
            backend.put(key_of(number), b"meta", [memoryview(bytes((number % 7) * MIB // 2))])
            usage = backend.usage()
            assert usage.capacity_bytes is not None, "usage() does not report the capacity"
            assert usage.nbytes <= usage.capacity_bytes
            if number % 5 == 0:
                backend.remove([key_of(number // 2)])

    # Damage.

    @pytest.mark.parametrize("nbytes", [100, 300_000])
    def test_damage_is_noticed_and_is_a_miss(
        self, backend: Backend, damage: Damage | None, nbytes: int
    ) -> None:
        if damage is None:
            pytest.skip("no fixture 'damage'; the kit verifies data itself")
        put(backend, key_of(1), bytes_of(nbytes))
        put(backend, key_of(2), bytes_of(nbytes, 2))
        damage(key_of(1))
        try:
            assert plain(backend.get(key_of(1))) in (None, (b"meta", bytes_of(nbytes)))
        except BackendError:
            pytest.fail("a damaged blob is a miss, not a BackendError of the store")
        assert plain(backend.get(key_of(2))) == (b"meta", bytes_of(nbytes, 2))
        put(backend, key_of(1), b"sound again")
        assert plain(backend.get(key_of(1))) == (b"meta", b"sound again")
