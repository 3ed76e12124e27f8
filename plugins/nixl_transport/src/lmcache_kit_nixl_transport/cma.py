"""Cross-memory attach (CMA): probe whether ``process_vm_readv`` can read a peer's memory."""

from __future__ import annotations

import ctypes
import os
from hashlib import sha256
from pathlib import Path


class _IoVec(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def boot_id() -> str:
    """Return the id of the running kernel, the same for all its processes; empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_refusal(pid: int, address: int, nbytes: int, digest: bytes) -> str:
    """Read ``nbytes`` at ``address`` of process ``pid``; return why that fails, or empty.

    The bytes must have this SHA-256: a pid of another namespace, or one that was reused, has other
    bytes there.
    """
    found = ctypes.create_string_buffer(nbytes)
    local = _IoVec(ctypes.addressof(found), nbytes)
    remote = _IoVec(address, nbytes)
    try:
        readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except AttributeError:
        return "this system has no process_vm_readv"
    readv.restype = ctypes.c_ssize_t
    pointer, long = ctypes.c_void_p, ctypes.c_ulong
    readv.argtypes = [ctypes.c_int, pointer, long, pointer, long, long]
    received = readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if received < 0:
        code = ctypes.get_errno()
        return f"process_vm_readv of process {pid}: {os.strerror(code)}{_hint(code)}"
    if received != nbytes or sha256(found.raw).digest() != digest:
        return f"process {pid} is not the peer, which is in another pid namespace"
    return ""


def _hint(code: int) -> str:
    known = {
        1: "; both processes need the same user, and ptrace between them must be allowed",
        3: "; it is gone, or in another pid namespace",
    }
    return known.get(code, "")
