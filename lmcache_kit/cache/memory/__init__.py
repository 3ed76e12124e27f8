"""The memory tier: allocation, pending stores, transcoding and transfers."""
