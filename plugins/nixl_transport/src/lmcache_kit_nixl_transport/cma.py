"""Cross-memory attach: whether the kernel lets us read a peer's memory (``process_vm_readv``)."""

from __future__ import annotations

import ctypes
import os
from hashlib import sha256
from pathlib import Path


class _Span(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def boot_id() -> str:
    """The same for all processes of one running kernel; empty if it does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def why_not(pid: int, address: int, nbytes: int, digest: bytes) -> str:
    """Why ``nbytes`` at ``address`` of process ``pid`` cannot be read; empty if they can, and are
    those with this SHA-256. A pid of another namespace, or one used anew, has other bytes there.
    """
    found = ctypes.create_string_buffer(nbytes)
    ours = _Span(ctypes.addressof(found), nbytes)
    theirs = _Span(address, nbytes)
    try:
        readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except AttributeError:
        return "this system has no process_vm_readv"
    readv.restype = ctypes.c_ssize_t
    pointer, long = ctypes.c_void_p, ctypes.c_ulong
    readv.argtypes = [ctypes.c_int, pointer, long, pointer, long, long]
    got = readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    if got < 0:
        code = ctypes.get_errno()
        return f"process_vm_readv of process {pid}: {os.strerror(code)}{_hint(code)}"
    if got != nbytes or sha256(found.raw).digest() != digest:
        return f"process {pid} is another one than the peer: it is in another pid namespace"
    return ""


def _hint(code: int) -> str:
    known = {
        1: "; both need the same user, and ptrace between them must be allowed",
        3: "; it is gone, or in another pid namespace",
    }
    return known.get(code, "")
