"""From cache process to cache process: how KV moves between instances."""
