"""The storage backend ``ValkeyBackend``: KV cache on a Valkey or Redis server.

1. One blob is one hash, written by one command: readers see the old blob or the new one.
2. The server is shared: other instances put and remove too, and the server evicts.
3. A call ends within seconds. Every failure is a BackendError with server, cause and remedy.
4. Values are sent from the memory where they lie, without a copy.
"""
