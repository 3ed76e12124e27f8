"""Every wire: framing, messages, addresses and authentication.

1. Messages are typed records in msgpack. Nothing is unpickled or evaluated.
2. A frame has a size limit and a protocol version. A peer of another version is refused with both.
3. A malformed frame is a ProtocolError, whatever is wrong with it, and costs its sender at most
   the connection.
4. KV never travels on these wires: transports and shared memory carry it.
"""
