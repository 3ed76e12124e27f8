"""Helpers that tests of the core and of the plugins share.

1. A module per subject: waiting, ports, processes, proxies, REST requests, stored KV, distributions
   on disk, clocks, terminals.
2. Helpers use the product as its users do: clients, programs, REST. Nothing reaches into private
   members.
3. A helper moves here when a second folder of tests needs it; what one folder needs stays in its
   ``conftest.py``.
4. Deadlines only bound hangs. They are generous, and no test passes or fails by its speed.
"""
