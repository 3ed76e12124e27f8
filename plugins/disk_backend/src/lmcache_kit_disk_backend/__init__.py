"""The storage backend ``LocalDiskBackend``: KV cache in files on a local disk."""
