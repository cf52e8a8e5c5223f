"""Models on disk: the cache, what fills it, and GGUF conversion. Needs the extra `octavo[models]`."""
