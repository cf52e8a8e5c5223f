"""The brain of Octavo: the request queue, the block table and continuous batches. Token ids only, no text, no torch."""

import service  # noqa: F401 - before gRPC
