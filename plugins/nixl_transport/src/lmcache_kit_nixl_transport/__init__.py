"""The transport ``nixl``: reads a peer's memory by NIXL, over RDMA or over CMA on one host.

1. The reader does everything; the peer only registers its memory.
2. A transfer that NIXL has begun cannot be cancelled. A read that is out of time says when its
   memory is settled, and until then nothing else may use that memory.
3. A path is proven before it is used: a connection reads random bytes and compares their digest.
4. Every error of NIXL becomes a TransportError, and the next transport is tried.
"""
