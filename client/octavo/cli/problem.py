"""How commands fail: one sentence on stderr and exit code 1."""

from __future__ import annotations

import re
from urllib.parse import unquote

import grpc
from octavo.client import OctavoError, Reason

NO_MODEL = "no model is served now; `make worker` starts a worker, `make ps` shows what runs"

# What gRPC says of a peer that speaks something else, with the peer's address.
_NO_GRPC = re.compile(r"(?:ipv[46]|unix):(\S+?): Failed parsing HTTP/2")
# What every gRPC server says of a service that it does not have.
_NO_SUCH_METHOD = "Method not found!"
_WHICH = "`make ps` shows which address is a router's (--address) and which the scheduler's (--scheduler)"


class CommandProblem(Exception):
    """What a command can't do, in one sentence for people."""


def sentence(error: Exception) -> str:
    """The error for people, with what to do about it where a command of ours does that."""
    if isinstance(error, OctavoError):
        if error.code is grpc.StatusCode.UNIMPLEMENTED and error.message == _NO_SUCH_METHOD:
            return f"what answers at this address is another service than the one that this command asks; {_WHICH}"
        if (other := _NO_GRPC.search(error.message)) is not None:
            return f"what answers at {unquote(other[1])} speaks no gRPC, as the HTTP and metrics ports do not; {_WHICH}"
        if error.broken:
            return f"{error} (nobody there? `make ps` shows the cluster, `make up` starts one)"
        if error.reason is Reason.NO_WORKER:
            return f"{error} (`make worker` starts one, `make ps` shows what runs)"
        if error.reason is Reason.UNAUTHENTICATED:
            variable = "OCTAVO_CLUSTER_TOKEN_FILE" if "token" in error.message else "OCTAVO_API_KEY"
            return f"{error} (give it by {variable}, or by --token-file FILE)"
        if error.message.startswith("model:") and error.reason is Reason.INVALID_ARGUMENT:
            return f"{error} (choose with --model)"
    return str(error)
