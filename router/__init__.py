"""The edge: validates, templates, tokenizes, streams. Text above it, token ids below. Never imports torch."""
