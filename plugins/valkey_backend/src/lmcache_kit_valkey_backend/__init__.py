"""The storage backend ``ValkeyBackend``: KV cache on a server that many share."""
