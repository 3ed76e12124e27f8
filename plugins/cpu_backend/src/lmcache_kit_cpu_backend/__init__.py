"""The storage backend ``LocalCPUBackend``: KV cache in shared host memory."""
