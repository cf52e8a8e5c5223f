"""How commands fail: one sentence on stderr and exit code 1."""

from __future__ import annotations

from octavo.client import OctavoError, Reason


class CommandProblem(Exception):
    """What a command can't do, in one sentence for people."""


def sentence(error: Exception) -> str:
    """The error for people, with what to do about it where a command of ours does that."""
    if isinstance(error, OctavoError):
        if error.broken:
            return f"{error} (nobody there? `make ps` shows the cluster, `make up` starts one)"
        if error.reason is Reason.UNAUTHENTICATED:
            variable = "OCTAVO_CLUSTER_TOKEN_FILE" if "token" in error.message else "OCTAVO_API_KEY"
            return f"{error} (give it by {variable}, or by --token-file FILE)"
        if error.message.startswith("model:") and error.reason is Reason.INVALID_ARGUMENT:
            return f"{error} (choose with --model)"
    return str(error)
