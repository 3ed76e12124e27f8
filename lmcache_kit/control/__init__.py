"""The control plane: the controller, the agent in the cache process, the wire between."""
