"""Resume tickets: proof that a router of this cluster accepted a request, so that any of them lets it go on.

Layout: version (1 byte), fields, HMAC-SHA256 over version and fields (32 bytes). The client keeps it and understands
nothing of it. Its arrival is a wall-clock time and only orders the queue; deadlines never depend on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from octavo.v1 import common_pb2

from service.errors import FieldViolation, OctavoError, Reason
from service.settings import SettingsError

_VERSION = b"\x02"
_FIXED = struct.Struct(
    "<QQ32s32s32sHH"
)  # arrival_ms, seed, digest, hashes of prompt and grammar, lengths of request id and tenant
_MAC_BYTES = 32
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a router must know again.

    `prompt_hash` is SHA-256 over the prompt's int32 column, `grammar_hash` over the grammar's message, zeros without one: a ticket
    resumes its own request only, and its grammar needs no second look.
    """

    request_id: str
    tenant: str
    arrival_ms: int  # Unix time
    seed: int
    digest: bytes
    prompt_hash: bytes
    grammar_hash: bytes = bytes(32)


class TicketOffice:
    """Issues and checks tickets. Routers with the same secret accept each other's."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: of the cluster, or random for a router that stands alone."""
        self._key = hashlib.sha256(b"octavo resume ticket" + secret).digest()

    def issue(self, ticket: Ticket) -> bytes:
        """The ticket as opaque bytes."""
        request_id, tenant = ticket.request_id.encode(), ticket.tenant.encode()
        fixed = _FIXED.pack(
            ticket.arrival_ms,
            ticket.seed,
            ticket.digest,
            ticket.prompt_hash,
            ticket.grammar_hash,
            len(request_id),
            len(tenant),
        )
        body = _VERSION + fixed + request_id + tenant
        return body + hmac.digest(self._key, body, "sha256")

    def check(self, data: bytes, tenant: str) -> Ticket:
        """The ticket in `data`. Raises TICKET_INVALID where it is forged, malformed or of another tenant."""
        body, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
        if not hmac.compare_digest(mac, hmac.digest(self._key, body, "sha256")) or body[:1] != _VERSION:
            raise invalid("the ticket was not issued by this cluster")
        arrival_ms, seed, digest, prompt_hash, grammar_hash, id_length, tenant_length = _FIXED.unpack_from(body, 1)
        names = body[1 + _FIXED.size :]
        ticket = Ticket(
            names[:id_length].decode(),
            names[id_length : id_length + tenant_length].decode(),
            arrival_ms,
            seed,
            digest,
            prompt_hash,
            grammar_hash,
        )
        if ticket.tenant != tenant:
            raise invalid("the ticket belongs to another tenant")
        return ticket


def grammar_hash(grammar: common_pb2.Grammar | None) -> bytes:
    """Of a request's grammar, as tickets hold it."""
    return bytes(32) if grammar is None else hashlib.sha256(grammar.SerializeToString(deterministic=True)).digest()


def invalid(message: str) -> OctavoError:
    """A TICKET_INVALID that names the field."""
    return OctavoError(Reason.TICKET_INVALID, message, violations=[FieldViolation("resume.ticket", message)])


def ticket_key(path: Path | None, token: str | None) -> bytes:
    """The secret that this router's tickets are signed with: the file's, else the cluster token, else one of this process alone.

    A file that isn't there is made, for its owner only; of several routers that start at once the first one makes it.
    Raises SettingsError.
    """
    if path is None:
        return token.encode() if token else secrets.token_bytes(_KEY_BYTES)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent) as fresh:
                fresh.write(secrets.token_hex(_KEY_BYTES).encode())
                fresh.flush()
                with contextlib.suppress(FileExistsError):
                    os.link(fresh.name, path)  # whole at once, and never in place of another router's key
        key = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"--ticket-key-file {path}: {error.strerror}") from None
    if len(key) < _KEY_BYTES:
        raise SettingsError(f"--ticket-key-file {path}: at least {_KEY_BYTES} bytes belong there")
    return key
