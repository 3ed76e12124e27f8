"""The storage backend ``LocalDiskBackend``: KV cache in files on a local disk.

1. One blob is one file. A file gets its name by rename, when it is complete: readers see the old
   blob or the new one, never a mixture.
2. The index is in memory; the directory is the truth. A start lists names and sizes only.
3. Disk space is reserved before a file is written, so that ``max_size_gib`` is never exceeded.
4. Damage is a miss: a damaged file is removed and logged.
5. One process at a time uses a directory, by ``flock``.
"""
