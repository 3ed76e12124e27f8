"""The agent: the control plane inside a cache process.

Design principles:

1. The engine never waits for the controller. Its threads append to an event log and wake the
   agent's thread; whether a controller is there makes no difference to a store or a load.
2. One thread and one outbound connection carry everything. The thread sleeps until something is
   due, and must not die: after a defect it connects again and sends a snapshot.
3. Protocols have no sockets: client, event log, barriers and operation runner say what to send,
   and take in what came.
4. The controller may lose, repeat and forget anything. What matters is numbered and sent until it
   is answered, and takes effect once.
"""
