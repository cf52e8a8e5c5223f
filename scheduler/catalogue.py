"""Which models are served here, and with which weights a worker may join those that serve a name. Sans I/O, a part of the hub."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.v1 import scheduler_pb2

from scheduler.assets import AssetStore
from scheduler.core import Scheduler
from scheduler.peers import WorkerPeer
from service.errors import OctavoError, Reason


class Catalogue:
    """Model names, digests and vocabularies. A name stands for one digest until an operator admits another beside it."""

    def __init__(self, core: Scheduler, assets: AssetStore, workers: Mapping[int, WorkerPeer]) -> None:
        """Reads all three, changes none."""
        self._core = core
        self._assets = assets
        self._workers = workers
        self._vocab_size: dict[bytes, int] = {}  # by model digest
        self._admitted: dict[str, set[bytes]] = {}

    def check(self, hello: scheduler_pb2.WorkerHello) -> None:
        """Raises MODEL_CHANGED for a digest that was not admitted, INVALID_ARGUMENT for another vocabulary of a digest in use."""
        model, digest = hello.model, hello.model_digest
        others = {worker.hello.model_digest for worker in self._workers.values() if worker.hello.model == model}
        if others and digest not in others and digest not in self._admitted.get(model, set()):
            raise OctavoError(
                Reason.MODEL_CHANGED,
                f"model {model!r} is served with digest {min(others).hex()[:12]}…; "
                f"{digest.hex()} was not admitted (octavo admit)",
            )
        # Requests that wait were checked against the vocabulary of their digest, which is the same wherever it is held.
        known = self._vocab_size.get(digest, hello.vocab_size)
        if hello.vocab_size != known and self._core.is_in_use(digest):
            raise OctavoError(
                Reason.INVALID_ARGUMENT,
                f"Hello: vocab_size is {hello.vocab_size}; this digest is served with a vocabulary of {known}",
            )

    def note(self, hello: scheduler_pb2.WorkerHello) -> None:
        """A worker that passed the check is here."""
        self._vocab_size[hello.model_digest] = hello.vocab_size
        self.admit(hello.model, hello.model_digest)

    def admit(self, model: str, digest: bytes) -> None:
        """Allow a further digest under a model name."""
        self._admitted.setdefault(model, set()).add(digest)

    def vocab_size(self, digest: bytes) -> int:
        """Raises NO_WORKER for a digest that no worker has held."""
        size = self._vocab_size.get(digest)
        if size is None:
            raise OctavoError(Reason.NO_WORKER, "no worker has held this digest yet", retry_after_ms=200)
        return size

    def served(self) -> list[scheduler_pb2.ServedModel]:
        """The models whose workers are here and whose assets have come; with 0 workers where all of them are leaving."""
        models: dict[tuple[str, bytes], scheduler_pb2.ServedModel] = {}  # the same weights may have two names
        for worker in self._workers.values():
            hello = worker.hello
            if hello.model_digest not in self._assets:
                continue
            model = models.setdefault(
                (hello.model, hello.model_digest),
                scheduler_pb2.ServedModel(
                    name=hello.model,
                    digest=hello.model_digest,
                    vocab_size=hello.vocab_size,
                    quantization=hello.quantization,
                ),
            )
            model.max_model_len = max(model.max_model_len, hello.max_model_len)
            model.workers += not worker.draining
        return list(models.values())
