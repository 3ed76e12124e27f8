"""The control plane inside the cache process."""
