"""The REST frontend of the lmcache-kit controller.

1. aiohttp routes, reads and writes; what it does is not done again here.
2. One table of routes. Routing, parsing and the OpenAPI document follow from it.
3. Pydantic models parse requests strictly, and describe themselves.
4. Every error has one shape, and what a client did is never a 500.
5. Handlers know the controller and their models; nothing of them knows HTTP.
"""
