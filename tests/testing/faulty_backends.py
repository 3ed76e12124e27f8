"""A backend that is right, and many that are wrong in one thing each.

``CAUGHT_BY``: the check of the suite that is there for it.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import threading
from contextlib import contextmanager
from tempfile import TemporaryFile

import pytest

from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces import Backend, Blob, BlobRecord, OpenBlob, StoreUsage
from lmcache_kit.testing import BackendSuite

MIB = 1 << 20
ROOM = 16 * MIB


class Disk(dict):
    """A dict that outlives its process: what a fork puts there goes to ``file`` as well."""

    def __init__(self, file):
        super().__init__()
        self.file = file
        self.home = os.getpid()

    def __setitem__(self, key, blob):
        super().__setitem__(key, blob)
        if os.getpid() != self.home:
            os.pwrite(self.file.fileno(), pickle.dumps(dict(self)), 0)

    def read(self):
        written = os.pread(self.file.fileno(), ROOM, 0)
        self.update(pickle.loads(written) if written else {})
        return self


class Right(Backend):
    """Blobs in a dict that outlives it. ``_turn``: one thread at a time."""

    def __init__(self, disk):
        self.disk = disk
        self.lock = threading.Lock()
        self.open = True

    @contextmanager
    def _turn(self):
        with self.lock:
            if not self.open:
                raise BackendError("closed")
            yield

    def used(self, without=None):
        return sum(size(blob) for key, blob in self.disk.items() if key != without)

    def put(self, key, meta, data):
        nbytes = len(meta) + sum(map(len, data))
        with self._turn():
            if self.used(without=key) + nbytes > ROOM:
                return False
            self.disk.pop(key, None)
            self.disk[key] = Blob(meta, b"".join(data))
            return True

    def get(self, key):
        with self._turn():
            return self.disk.get(key)

    def contains(self, keys):
        with self._turn():
            return [key in self.disk for key in keys]

    def remove(self, keys):
        with self._turn():
            for key in keys:
                self.disk.pop(key, None)

    def scan(self):
        with self._turn():
            found = list(self.disk.items())
        return (BlobRecord(key, blob.meta, len(blob.data)) for key, blob in found)

    def usage(self):
        with self._turn():
            return StoreUsage(len(self.disk), self.used(), ROOM)

    def close(self):
        with self.lock:
            self.open = False


def size(blob):
    return len(blob.meta) + len(blob.data)


class Shared(Right):
    shared = True


class ForgetsToFlush(Right):
    """What is put last is not there after a restart."""

    def close(self):
        if self.open and self.disk:
            self.disk.popitem()
        super().close()


class WritesWhenItCloses(Right):
    """Until then all is in memory."""

    def __init__(self, disk):
        super().__init__(dict(disk))
        self.below = disk

    def close(self):
        if self.open:
            self.below.clear()
            self.below.update(self.disk)
        super().close()


class CutsOff(Right):
    def get(self, key):
        blob = super().get(key)
        return blob and Blob(blob.meta, blob.data[: 1 << 16])


class OpensAnything(Right):
    """Where ``get`` opens what others read."""

    def opened(self, blob):
        return io.BytesIO(blob.data)

    def get(self, key):
        blob = super().get(key)
        return blob and OpenBlob(blob.meta, self.opened(blob))


class OpensAtTheMeta(OpensAnything):
    def opened(self, blob):
        return io.BytesIO(blob.meta + blob.data)


class ClosesWhatOthersRead(OpensAnything):
    def __init__(self, disk):
        super().__init__(disk)
        self.files = []

    def opened(self, blob):
        self.files.append(super().opened(blob))
        return self.files[-1]

    def close(self):
        super().close()
        for file in self.files:
            file.close()


class CountsWhatItWasAskedFor(OpensAnything):
    """Instead of what there was."""

    def opened(self, blob):
        class File(io.BytesIO):
            def readinto(self, buffer):
                return len(buffer) if super().readinto(buffer) else 0

        return File(blob.data)


class KeepsTheCallersMemory(Right):
    def put(self, key, meta, data):
        done = super().put(key, meta, data)
        if done and len(data) == 1:
            self.disk[key] = Blob(meta, data[0])
        return done


class JoinsBackwards(Right):
    def put(self, key, meta, data):
        return super().put(key, meta, data[::-1])


class GivesNumbers(Right):
    """Which are equal to bytes, once they are made so."""

    def get(self, key):
        blob = super().get(key)
        return blob and Blob(blob.meta, list(blob.data))


class LosesTheMeta(Right):
    def put(self, key, meta, data):
        return super().put(key, meta[:1000], data)


class SwapsTwoKeys(Right):
    """Its keys are of 8 bytes."""

    def put(self, key, meta, data):
        return super().put(key[:8].ljust(16), meta, data)

    def get(self, key):
        return super().get(key[:8].ljust(16))

    def contains(self, keys):
        return super().contains([key[:8].ljust(16) for key in keys])


class WantsText(Right):
    def put(self, key, meta, data):
        json.dumps({key.decode("latin1").strip(): 1})
        return super().put(key.strip(), meta, data)


class RaisesForWhatIsMissing(Right):
    def get(self, key):
        with self._turn():
            return self.disk[key]


class RaisesForWhatIsGone(Right):
    def remove(self, keys):
        with self._turn():
            for key in keys:
                del self.disk[key]


class AnswersInItsOwnOrder(Right):
    def contains(self, keys):
        return [each for _, each in sorted(zip(keys, super().contains(keys), strict=True))]


class AnswersForDistinctKeys(Right):
    def contains(self, keys):
        return super().contains(list(dict.fromkeys(keys)))


class ScansAPage(Right):
    def scan(self):
        return itertools.islice(super().scan(), 256)


class ScansWithTheOldMeta(Right):
    def __init__(self, disk):
        super().__init__(disk)
        self.metas = {}

    def put(self, key, meta, data):
        self.metas.setdefault(key, meta)
        return super().put(key, meta, data)

    def scan(self):
        return (each._replace(meta=self.metas.get(each.key, each.meta)) for each in super().scan())


class ScansOnce(Right):
    def scan(self):
        if not hasattr(self, "scanning"):
            self.scanning = super().scan()
        return self.scanning


class ScansTheDictItself(Right):
    def scan(self):
        with self._turn():
            pass
        for key, blob in self.disk.items():
            yield BlobRecord(key, blob.meta, len(blob.data))


class HoldsItsLockWhileItScans(Right):
    def scan(self):
        with self._turn():
            for key, blob in self.disk.items():
                yield BlobRecord(key, blob.meta, len(blob.data))


class Miscounts(Right):
    """What takes the place of another counts as one more."""

    def __init__(self, disk):
        super().__init__(disk)
        self.count = len(disk)

    def put(self, key, meta, data):
        done = super().put(key, meta, data)
        self.count += done
        return done

    def remove(self, keys):
        self.count -= sum(super().contains(list(set(keys))))
        super().remove(keys)

    def usage(self):
        return super().usage().__class__(self.count, self.used(), ROOM)


class CountsFromZeroAgain(Right):
    def __init__(self, disk):
        super().__init__(disk)
        self.before = self.used()

    def usage(self):
        usage = super().usage()
        return StoreUsage(usage.entries, max(0, usage.nbytes - self.before), ROOM)


class CountsTheMetaOfWhatIsGone(Right):
    def __init__(self, disk):
        super().__init__(disk)
        self.metas = sum(len(blob.meta) for blob in disk.values())

    def put(self, key, meta, data):
        done = super().put(key, meta, data)
        self.metas += len(meta) if done else 0
        return done

    def usage(self):
        usage = super().usage()
        data = sum(each.nbytes for each in super().scan())
        return StoreUsage(usage.entries, min(data + self.metas, ROOM), ROOM)


class PutsBeyondItsRoom(Right):
    def put(self, key, meta, data):
        blob = Blob(meta, b"".join(data))
        with self._turn():
            if size(blob) > ROOM:
                return False
            self.disk[key] = blob
            return True


class MakesRoomByItself(Right):
    """It evicts what it likes."""

    def put(self, key, meta, data):
        done = super().put(key, meta, data)
        while not done and self.disk:
            with self.lock:
                self.disk.pop(next(iter(self.disk)))
            done = super().put(key, meta, data)
        return done


class LosesUnderConcurrency(Right):
    """A copy of the dict goes back and forth."""

    def put(self, key, meta, data):
        with self._turn():
            copy = dict(self.disk)
        blob = Blob(meta, b"".join(data))
        threading.Event().wait(0.0005)
        with self._turn():
            copy[key] = blob
            if sum(size(each) for each in copy.values()) > ROOM:
                return False
            self.disk.clear()
            self.disk.update(copy)
            return True


class ShowsAMixture(Right):
    """The meta first, and the data when they have come."""

    def put(self, key, meta, data):
        with self._turn():
            old = self.disk.get(key)
        if old is not None:
            with self._turn():
                self.disk[key] = Blob(meta, old.data)
            threading.Event().wait(0.001)
        return super().put(key, meta, data)


class HasOneScratchFileForAKey(Right):
    """Alone it does well."""

    def __init__(self, disk):
        super().__init__(disk)
        self.scratch = {}

    def put(self, key, meta, data):
        self.scratch[key] = meta
        threading.Event().wait(0.0005)
        return super().put(key, self.scratch[key], data)


class ServesAfterClose(Right):
    def close(self):
        pass


class ClosesOnce(Right):
    def close(self):
        with self._turn():
            self.open = False


class RaisesItsOwnErrors(Right):
    @contextmanager
    def _turn(self):
        with self.lock:
            if not self.open:
                raise OSError(9, "closed")
            yield


class LeavesAThread(Right):
    def __init__(self, disk):
        super().__init__(disk)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class AcceptsDamage(Right):
    pass


class KeepsToItself(Shared):
    """What others put it does not see."""

    def __init__(self, disk):
        super().__init__(dict(disk))


CAUGHT_BY = {
    ForgetsToFlush: "test_all_is_there_when_it_is_opened_again",
    WritesWhenItCloses: "test_what_was_put_is_there_after_a_kill",
    CutsOff: "test_a_blob_comes_back_as_it_was",
    KeepsTheCallersMemory: "test_a_blob_stays_when_the_memory_it_came_from_is_used_again",
    JoinsBackwards: "test_pieces_are_joined_in_their_order",
    GivesNumbers: "test_what_comes_back_are_bytes",
    LosesTheMeta: "test_meta_comes_back_however_long_it_is",
    OpensAtTheMeta: "test_a_blob_comes_back_as_it_was",
    ClosesWhatOthersRead: "test_a_blob_that_was_got_outlives_the_backend",
    CountsWhatItWasAskedFor: "test_a_blob_comes_back_as_it_was",
    SwapsTwoKeys: "test_keys_that_differ_in_a_bit_are_others",
    WantsText: "test_any_16_bytes_are_a_key",
    RaisesForWhatIsMissing: "test_what_is_not_there_is_none",
    RaisesForWhatIsGone: "test_removing_what_is_not_there_is_passed_over",
    AnswersInItsOwnOrder: "test_contains_answers_for_each_key_in_order",
    AnswersForDistinctKeys: "test_contains_answers_for_each_key_in_order",
    ScansAPage: "test_scan_tells_each_blob_once",
    ScansWithTheOldMeta: "test_scan_tells_each_blob_once",
    ScansOnce: "test_scans_do_not_disturb_each_other",
    ScansTheDictItself: "test_scan_goes_on_while_others_put_and_remove",
    HoldsItsLockWhileItScans: "test_scan_goes_on_while_others_put_and_remove",
    Miscounts: "test_usage_counts",
    CountsFromZeroAgain: "test_room_is_counted_after_a_restart",
    CountsTheMetaOfWhatIsGone: "test_room_comes_back_with_what_is_removed",
    PutsBeyondItsRoom: "test_it_never_takes_more_room_than_it_has",
    MakesRoomByItself: "test_what_does_not_fit_is_refused_and_changes_nothing",
    LosesUnderConcurrency: "test_threads_with_keys_of_their_own_lose_nothing",
    ShowsAMixture: "test_a_reader_gets_a_blob_whole_while_it_is_replaced",
    HasOneScratchFileForAKey: "test_threads_with_the_same_keys_leave_whole_blobs",
    ServesAfterClose: "test_whatever_is_asked_of_a_closed_one_is_a_backend_error",
    ClosesOnce: "test_closing_twice_is_fine",
    RaisesItsOwnErrors: "test_whatever_is_asked_of_a_closed_one_is_a_backend_error",
    LeavesAThread: "test_closing_gives_everything_back",
    AcceptsDamage: "test_damage_is_noticed_and_is_a_miss",
    KeepsToItself: "test_two_that_share_a_store_see_what_each_other_does",
}


def suite_of(made):
    class Made(BackendSuite):
        persists = True
        bounded_bytes = ROOM
        timeout_s = 10.0 if made in (Right, OpensAnything) else 2.0

        @pytest.fixture
        def disk(self):
            with TemporaryFile() as file:
                yield Disk(file)

        @pytest.fixture
        def make_backend(self, disk):
            return lambda: made(disk.read())

        if made is AcceptsDamage:

            @pytest.fixture
            def damage(self, disk):
                def spoil(key):
                    disk[key] = disk[key]._replace(data=b"?" + disk[key].data[1:])

                return spoil

    Made.__name__ = Made.__qualname__ = f"Test{made.__name__}"
    return Made


globals().update(
    {f"Test{each.__name__}": suite_of(each) for each in (Right, OpensAnything, *CAUGHT_BY)}
)
