"""Idempotency keys of one router process: a key runs once at a time, and a higher attempt takes it over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from service.errors import OctavoError, Reason


@dataclass(slots=True, eq=False)
class Claim:
    """Who holds a key. `give_up` ends the holder's request."""

    tenant: str
    key: str
    attempt: int
    give_up: Callable[[OctavoError], None]


class IdempotencyKeys:
    """The keys in use now. An empty key claims nothing."""

    def __init__(self) -> None:
        self._claims: dict[tuple[str, str], Claim] = {}

    def claim(self, tenant: str, key: str, attempt: int, give_up: Callable[[OctavoError], None]) -> Claim:
        """Take the key, from a lower attempt if need be. Raises DUPLICATE_REQUEST."""
        claim = Claim(tenant, key, attempt, give_up)
        if not key:
            return claim
        holder = self._claims.get((tenant, key))
        if holder is not None and attempt <= holder.attempt:
            raise OctavoError(
                Reason.DUPLICATE_REQUEST,
                f"idempotency_key {key!r} is running as attempt {holder.attempt}; only a higher one may take over",
            )
        self._claims[tenant, key] = claim
        if holder is not None:
            holder.give_up(OctavoError(Reason.DUPLICATE_REQUEST, f"attempt {attempt} of {key!r} took over"))
        return claim

    def release(self, claim: Claim) -> None:
        """The request is over. Without effect where another attempt holds the key."""
        if self._claims.get((claim.tenant, claim.key)) is claim:
            del self._claims[claim.tenant, claim.key]
