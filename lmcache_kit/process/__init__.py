"""The local socket between a cache process and its clients.

1. A client never waits for a process that does not answer: each call has a deadline, and a late
   answer is a miss.
2. The kernel tells the server when a client dies; its leases and unfinished stores end with its
   connection.
3. Whatever a connection sends, it can at worst end itself.
4. One process serves at a path. File locks decide which one, so that a crash leaves nothing stale.
5. KV does not pass the socket: clients map the memory, whose descriptor the first answer carries.
"""
