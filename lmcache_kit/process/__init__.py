"""The cache process: the engine behind a local socket, its client, and its life."""
