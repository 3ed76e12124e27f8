"""What a cache process is composed of, and how one is launched."""
