"""The cache engine: what lies where, for how long, and what leaves first. No sockets here."""
