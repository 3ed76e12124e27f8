"""Moves of chunks: between cache processes, and between the tiers of one.

1. Copy, verify, confirm, delete, in this order. A crash at any step leaves two copies, never none.
2. The destination drives. The source answers, and does nothing that the controller has not signed.
3. One engine for all moves: a source (a peer or a tier of this process), a destination, one report.
4. Bytes are verified where they arrive, and memory that they may still arrive in is not reused.
5. A transport may fail or hang, and its reason is reported; the next one is tried.
"""
