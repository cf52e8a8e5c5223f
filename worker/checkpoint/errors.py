"""The one error of this package."""

from __future__ import annotations

from worker.backend import BackendError


class CheckpointError(BackendError):
    """A checkpoint cannot be served. The text names the file and the key or tensor at fault."""
