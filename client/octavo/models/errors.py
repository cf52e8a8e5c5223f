"""What can go wrong between a model's name and a directory that a worker can load.

Each message stands alone: it names the file, and the tensor or key where there is one, and says what to do.
"""

from __future__ import annotations

from pathlib import Path


class ModelError(Exception):
    """Base of all; the command line prints it without a traceback."""


class ModelNotFoundError(ModelError):
    """No such directory, and nothing of that name in the cache."""


class CacheError(ModelError):
    """The cache or an output directory cannot be written, or is already taken."""


class PullError(ModelError):
    """A download failed, was refused, or brought something other than expected."""


class ConvertError(ModelError):
    """A well-formed GGUF file that holds a model which cannot be expressed as a Hugging Face directory."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class GGUFError(ConvertError):
    """A GGUF file that is malformed: truncated, with sizes that lie, or with keys or tensors missing."""
