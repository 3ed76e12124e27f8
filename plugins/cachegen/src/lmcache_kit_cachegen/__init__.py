"""The codec ``cachegen``: KV cache in a fifth of the memory, with a bound on the error.

1. The encoder checks the error bound on the values that a decoder will see. A stream that misses
   the bound is stored losslessly.
2. The entropy coder's tables are static integers, the same on every machine; a hash in the blob
   names them.
3. A blob is untrusted: every flipped bit and every cut raises before anything is written to the
   payload.
4. Profiles are data, made once per model. A blob names the profile that it needs by its hash.
"""
