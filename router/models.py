"""The models that can be asked for now, merged over all schedulers; and those that were served before.

A model whose last worker has just gone lingers: new requests for it wait instead of being refused, so that an upgrade or a crash of
the only worker or scheduler is a pause for newcomers, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.v1 import scheduler_pb2

from service.errors import FieldViolation, OctavoError, Reason

_MAX_WORKERS = 1 << 20  # of one scheduler
_MAX_SHOWN = 16  # names in an error
_MAX_NAME = 200  # characters of a client's text in one


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One digest under one name. `workers` are counted over all schedulers."""

    name: str
    digest: bytes
    max_model_len: int
    vocab_size: int
    workers: int
    quantization: str = ""


def checked(served: Iterable[scheduler_pb2.ServedModel]) -> tuple[scheduler_pb2.ServedModel, ...]:
    """What a scheduler says that it serves. Raises PROTOCOL_VIOLATION for what no model can be: its numbers become int32 columns."""
    models = tuple(served)
    for model in models:
        sizes_fit = 0 < model.vocab_size < 2**31 and 0 < model.max_model_len < 2**31
        if not model.name or len(model.digest) != 32 or not sizes_fit or model.workers > _MAX_WORKERS:
            raise OctavoError(Reason.PROTOCOL_VIOLATION, f"a served model {model.name[:80]!r} that can't be")
    return models


def unknown_model(name: str, served: Iterable[str]) -> OctavoError:
    """MODEL_UNKNOWN, with the names of those that are served."""
    names = sorted(set(served))
    shown = ", ".join(names[:_MAX_SHOWN]) + (", …" if len(names) > _MAX_SHOWN else "")
    what = f"served {'is' if len(names) == 1 else 'are'} {shown}" if names else "none is served at present"
    return OctavoError(Reason.MODEL_UNKNOWN, f"no model named {name[:_MAX_NAME]!r}: {what}")


class ModelDirectory:
    """What is served now, by name and digest. Owned by the session."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, bytes], KnownModel] = {}  # the same weights may be served under two names
        # Lingering, and since when; infinity while its last workers are still leaving.
        self._gone: dict[tuple[str, bytes], tuple[KnownModel, float]] = {}
        self._names_seen: set[str] = set()

    def update(self, served: Iterable[scheduler_pb2.ServedModel], now: float) -> None:
        """Replace everything by what the schedulers say at `now`, in seconds."""
        merged: dict[tuple[str, bytes], KnownModel] = {}
        leaving: set[tuple[str, bytes]] = set()
        for model in served:
            key = (model.name, model.digest)
            if not model.workers:
                leaving.add(key)
                continue
            old = merged.get(key)
            merged[key] = KnownModel(
                model.name,
                model.digest,
                model.max_model_len if old is None else min(model.max_model_len, old.max_model_len),
                model.vocab_size if old is None else min(model.vocab_size, old.vocab_size),
                model.workers + (0 if old is None else old.workers),
                model.quantization,
            )
        before = {key: model for key, (model, _) in self._gone.items()} | self._models
        since = {key: gone[1] for key, gone in self._gone.items() if gone[1] != math.inf}
        self._gone = {
            key: (model, math.inf if key in leaving else since.get(key, now))
            for key, model in before.items()
            if key not in merged
        }
        self._names_seen.update(name for name, _ in leaving)
        self._models = merged
        self._names_seen.update(model.name for model in merged.values())

    def all(self) -> list[KnownModel]:
        """Ordered by name, then by digest."""
        return [self._models[key] for key in sorted(self._models)]

    def forget_gone(self, before: float) -> None:
        """What went before this time, in seconds, lingers no more."""
        if self._gone:
            self._gone = {key: gone for key, gone in self._gone.items() if gone[1] >= before}

    def lingers(self, digest: bytes) -> bool:
        """Whether nobody serves this digest now, but somebody did until just now."""
        return any(key[1] == digest for key in self._gone)

    def digests(self) -> set[bytes]:
        """All digests served now."""
        return {digest for _, digest in self._models}

    def by_digest(self, digest: bytes) -> KnownModel | None:
        """The model with this digest, by the first of its names, if it is served now or lingers."""
        return next((model for model in [*self.all(), *self._lingering()] if model.digest == digest), None)

    def find(self, name: str) -> KnownModel:
        """The model of this name; of several digests the one with most workers. "" is the only model there is.

        Raises MODEL_UNKNOWN, NO_WORKER, or INVALID_ARGUMENT where "" could be several.
        """
        found = [model for model in self.all() if name in ("", model.name)]
        found = found or [model for model in self._lingering() if name in ("", model.name)]
        if not name and len({model.name for model in found}) > 1:
            names = ", ".join(sorted({model.name for model in found}))
            wrong = f"must be one of {names}"
            raise OctavoError(Reason.INVALID_ARGUMENT, f"model: {wrong}", violations=[FieldViolation("model", wrong)])
        if found:
            return max(found, key=lambda model: model.workers)
        if not name or name in self._names_seen or not self._names_seen:
            raise OctavoError(
                Reason.NO_WORKER, f"no worker serves {name or 'any model'} at present", retry_after_ms=1_000
            )
        raise unknown_model(name, (model.name for model in self.all()))

    def _lingering(self) -> list[KnownModel]:
        return [self._gone[key][0] for key in sorted(self._gone)]
