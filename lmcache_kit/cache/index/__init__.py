"""The index of a tier: which chunks it has, how they follow each other, and what holds them.

1. **Tokens, not hashes, decide a match**: siblings are sorted by their tokens, so that the last
   chunk of a match may agree in a part of its tokens.
2. **Counts, not scans, decide an eviction**: each payload and entry counts its holds.
3. **A child never outlives the way to it**: parents leave after their children.
4. **The index knows no bytes.** Memory and stores extend it by what an entry occupies.
"""
