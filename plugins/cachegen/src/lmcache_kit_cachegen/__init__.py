"""The codec ``cachegen``: KV cache in a fifth of the memory, with a bound on the error."""
