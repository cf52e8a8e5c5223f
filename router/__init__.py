"""The edge: validates, templates, tokenizes, streams. Text above it, token ids below. Never imports torch."""

import service  # noqa: F401 - before gRPC
