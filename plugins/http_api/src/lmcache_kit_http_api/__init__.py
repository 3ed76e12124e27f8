"""The REST frontend of the lmcache-kit controller. :mod:`.plugin` says what it offers."""
