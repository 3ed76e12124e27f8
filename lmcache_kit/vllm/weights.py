"""Identify the weights of a model or an adapter by their content.

Tensors are hashed by name, so the folder, the names of files and the distribution of tensors over
files do not matter. A sampled digest reads three pages of each tensor: it tells any training, merge
or quantisation apart, but not an edit of single elements. A full digest reads everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from blake3 import blake3

_DOMAIN = b"lmcache-kit/weights/1"
_PAGE = 4096
_MAX_HEADER = 100 << 20  # the limit of the safetensors library itself
_PIECE = 16 << 20
_FILE_SAMPLES = 4096
_BATCH = 256
_THREADS = 8
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".tensors")
"""Formats of weights, in the order in which vLLM prefers them."""
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "trainer_state", "scaler")

Offset = Annotated[int, msgspec.Meta(ge=0)]


class _Tensor(msgspec.Struct, frozen=True):
    """The entry of a tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[Offset, Offset]


class _Extent(NamedTuple):
    """Bytes ``[start, end)`` of an open file, and what precedes them in their digest."""

    fd: int
    label: bytes
    start: int
    end: int


def digest(files: Iterable[Path], *, full: bool = False) -> str:
    """Return the digest of weights, as hex of 16 bytes.

    Raises OSError for a file that cannot be read, and ValueError for one that is damaged.
    """
    paths = sorted(files, key=lambda path: path.name)
    with ThreadPoolExecutor(_THREADS) as pool, closing(_Files(paths)) as opened:
        extents = list(opened.extents())
        batches = [extents[at : at + _BATCH] for at in range(0, len(extents), _BATCH)]
        done = pool.map(lambda batch: [_digest(each, full) for each in batch], batches)
        digests = [each for batch in done for each in batch]
    kind = b"full" if full else b"sampled"
    return blake3(b"".join([_DOMAIN, kind, *sorted(digests)])).hexdigest(16)


def weight_files(source: Path) -> list[Path]:
    """Return the files with weights of a folder, all of one format, or ``source`` if it is a file.

    Empty when there are none.
    """
    if source.is_file():
        return [source]
    for suffix in _SUFFIXES:
        found = [
            each
            for each in sorted(source.glob(f"*{suffix}"))
            if not each.name.startswith(_NOT_WEIGHTS)
        ]
        if found:
            return found
    return []


class _Files:
    """Open files with weights."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = paths
        self._fds: list[int] = []

    def extents(self) -> Iterator[_Extent]:
        """Yield each tensor of a safetensors file, and any other file as a whole."""
        for path in self._paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._fds.append(fd)
            size = os.fstat(fd).st_size
            if path.suffix == ".safetensors":
                yield from _tensors(path, fd, size)
            else:
                yield _Extent(fd, b"file", 0, size)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


def _tensors(path: Path, fd: int, size: int) -> Iterator[_Extent]:
    """Read the header of a safetensors file: its length as u64, then JSON."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise ValueError(f"{path} is no safetensors file: its header has {length} bytes")
    try:
        header = json.loads(os.pread(fd, length, 8))
        header.pop("__metadata__", None)
        tensors = msgspec.convert(header, dict[str, _Tensor])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    data = 8 + length
    for name, tensor in tensors.items():
        start, end = tensor.data_offsets
        if not start <= end <= size - data:
            raise ValueError(f"{path} is cut short: tensor {name!r} ends behind it")
        label = json.dumps([name, tensor.dtype, tensor.shape]).encode()
        yield _Extent(fd, label, data + start, data + end)


def _digest(extent: _Extent, full: bool) -> bytes:
    hasher = blake3(extent.label + b"\0" + (extent.end - extent.start).to_bytes(8, "little"))
    for start, end in _pieces(extent) if full else _samples(extent):
        hasher.update(os.pread(extent.fd, end - start, start))
    return hasher.digest()


def _pieces(extent: _Extent) -> Iterator[tuple[int, int]]:
    for start in range(extent.start, extent.end, _PIECE):
        yield start, min(start + _PIECE, extent.end)


def _samples(extent: _Extent) -> Iterator[tuple[int, int]]:
    """Yield a page at the start, in the middle and at the end; many of a whole file."""
    count = 3 if extent.label != b"file" else _FILE_SAMPLES
    size = extent.end - extent.start
    if size <= count * _PAGE:
        yield extent.start, extent.end
        return
    for index in range(count):
        start = extent.start + index * (size - _PAGE) // (count - 1)
        yield start, start + _PAGE
