"""The cache process: its parts, put together from a configuration, and how one is launched.

1. This package alone knows all parts. The engine, the socket, peers and the agent know no plugin
   registry and no configuration beyond their own values.
2. A mistake in the configuration ends a start with an error that names it, and nothing that was
   opened stays open. What this machine does not give now is left out, logged, and tried again.
3. Clients never wait for a start. A late or absent cache process is a miss, and is tried again.
4. One cache process serves an instance. A file lock says which; a process with other settings makes
   room once it has no client.
"""
