"""The transport ``tcp``: KV over one plain or TLS connection a peer, on any network.

1. The cache process dials, accepts, authenticates and encrypts connections; the transport opens no
   port.
2. Bytes go from memory to socket and from socket to memory, and are hashed as they arrive.
3. A read ends at its deadline, and its connection is closed by then: no byte can arrive later.
4. A peer names an offer by a random token, never an address in memory.
5. Every frame has a check. A corrupt frame ends the connection; a corrupt region does not.
"""
