"""The muscle of Octavo: weights, the paged KV cache, the model and the sampler behind one `Backend` seam."""

import service  # noqa: F401 - before gRPC
