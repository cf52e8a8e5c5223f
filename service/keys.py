"""Who a caller is, by the secret that it shows: API keys for tenants, the cluster token for processes. Values only, no gRPC.

A key file has one key a line, `KEY TENANT [ROLE]`; empty lines and what follows a `#` at the start of a word are ignored. Keys
are kept as SHA-256 digests and looked up by them, so that the time of a look-up says nothing of how close a guess was.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.settings import SettingsError, unreadable

DEFAULT_TENANT = "default"
_MIN_KEY_LENGTH = 16
_KEY = re.compile(r"[!-~]+")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COMMENT = re.compile(r"(^|\s)#.*")


class Role(enum.StrEnum):
    """What a caller may call: a client serves itself, an admin (and every process of the cluster) may do all."""

    CLIENT = "client"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller."""

    tenant: str
    role: Role


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys of one file, by the SHA-256 digest of each."""

    callers: Mapping[bytes, Caller]

    @classmethod
    def parse(cls, text: str) -> ApiKeys:
        """Raises ValueError that names the line, and never the key."""
        callers: dict[bytes, Caller] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = _COMMENT.sub("", line).split()
            if not words:
                continue
            if len(words) not in (2, 3):
                raise ValueError(f"line {number}: KEY TENANT [ROLE] belongs there")
            key, tenant, role = words[0], words[1], words[2] if len(words) == 3 else Role.CLIENT
            if len(key) < _MIN_KEY_LENGTH or not _KEY.fullmatch(key):
                raise ValueError(f"line {number}: a key has at least {_MIN_KEY_LENGTH} visible ASCII characters")
            if not _TENANT.fullmatch(tenant):
                raise ValueError(f"line {number}: a tenant is a name of letters, digits and . _ - (64 at most)")
            if role not in tuple(Role):
                shown = f" {role!r}" if len(role) < _MIN_KEY_LENGTH else ""  # it may be a key in the wrong place
                raise ValueError(f"line {number}: the role{shown} is none of {', '.join(Role)}")
            digest = _digest(key)
            if digest in callers:
                raise ValueError(f"line {number}: the key stands in an earlier line, too")
            callers[digest] = Caller(tenant, Role(role))
        if not callers:
            raise ValueError("there is no key in it")
        return cls(callers)

    @classmethod
    def of(cls, path: Path | None, listed: str | None) -> ApiKeys | None:
        """Those of the file or of the list, if there is either. Raises SettingsError."""
        if path is not None:
            return cls.read(path)
        return None if listed is None else cls.listed(listed)

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """The keys of a file. Raises SettingsError."""
        try:
            return cls.parse(path.read_text())
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise unreadable("--api-keys", path, error) from None

    @classmethod
    def listed(cls, text: str) -> ApiKeys:
        """The keys of OCTAVO_API_KEY_LIST: the lines of such a file, or the same with commas between them. Raises SettingsError."""
        try:
            return cls.parse(text.replace(",", "\n"))
        except ValueError as error:
            raise SettingsError(f"OCTAVO_API_KEY_LIST: {error}") from None

    def find(self, key: str) -> Caller | None:
        """Whose key it is."""
        return self.callers.get(_digest(key))


class Authenticator:
    """Tells callers by `authorization: Bearer SECRET`. Where neither a token nor keys are set, everyone who reaches us is trusted."""

    def __init__(self, token: str | None = None, keys: ApiKeys | None = None) -> None:
        self._token = None if token is None else token.encode()
        self.keys = keys  # replaced as a whole when the file is read again

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a secret."""
        return self._token is None and self.keys is None

    def identify(self, authorization: str | None) -> Caller | None:
        """The caller that shows this header, or None if it isn't known. The cluster token makes an admin of tenant "default"."""
        if self.is_open:
            return Caller(DEFAULT_TENANT, Role.ADMIN)
        secret = _shown(authorization)
        if secret is None:
            return None
        if self._token is not None and hmac.compare_digest(secret.encode(), self._token):
            return Caller(DEFAULT_TENANT, Role.ADMIN)
        return None if self.keys is None else self.keys.find(secret)

    def refusal(self, authorization: str | None) -> str:
        """Why `identify` knows nobody by this header, in one sentence."""
        what, wanted = ("key", "an API key") if self.keys is not None else ("token", "the cluster token")
        if _shown(authorization) is None:
            return f"no {what} was given: {wanted} is needed, as authorization: Bearer {what.upper()}"
        return f"this {what} is not known: {wanted} of this server is needed, as authorization: Bearer {what.upper()}"


def _shown(authorization: str | None) -> str | None:
    """The secret in such a header."""
    scheme, _, secret = (authorization or "").partition(" ")
    return secret if scheme.lower() == "bearer" and secret else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
