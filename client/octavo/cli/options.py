"""Options that several commands share, and the clients made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from octavo.client import Client
from octavo.client.admin import AdminClient
from octavo.client.connection import Connection, connect_to

_ROUTING = "Connection"
_SAMPLING = "Sampling"

Model = Annotated[str, typer.Option("--model", "-m", help="Model to ask; may be left out where only one is served.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Router address, or several with commas. Default: $OCTAVO_ADDRESS, then .run/cluster.json, then 127.0.0.1:50051.",
        rich_help_panel=_ROUTING,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Scheduler address. Default: $OCTAVO_SCHEDULER, then .run/cluster.json, then 127.0.0.1:50061.",
        rich_help_panel=_ROUTING,
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the API key or the cluster token. Default: the key $OCTAVO_API_KEY, then $OCTAVO_CLUSTER_TOKEN_FILE.",
        rich_help_panel=_ROUTING,
    ),
]
Tls = Annotated[bool, typer.Option("--tls", help="Connect with TLS.", rich_help_panel=_ROUTING)]
TlsCa = Annotated[
    Path | None,
    typer.Option(help="PEM certificates to trust instead of the system's; implies --tls.", rich_help_panel=_ROUTING),
]
Timeout = Annotated[float | None, typer.Option(help="Give up after so many seconds.", min=0.001)]

MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", "-n", help="Output tokens at most.", min=1, rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 is greedy.", min=0.0, rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float | None, typer.Option(help="Smallest set of tokens with this probability.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int | None, typer.Option(help="Best tokens to keep; 0 keeps all.", min=0, rich_help_panel=_SAMPLING)]
MinP = Annotated[
    float | None, typer.Option(help="Drop tokens below this share of the best.", rich_help_panel=_SAMPLING)
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1 makes repetition rarer.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.", min=0, rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be repeated.", rich_help_panel=_SAMPLING)
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on past the model's end token.", rich_help_panel=_SAMPLING)
]


def router_connection(address: str | None, token_file: Path | None, tls: bool, tls_ca: Path | None) -> Connection:
    """How to reach the routers."""
    return connect_to(address, token_file=token_file, tls=tls, tls_ca=tls_ca)


def open_client(address: str | None, token_file: Path | None, tls: bool, tls_ca: Path | None) -> Client:
    """A client of the routers; the caller closes it."""
    return Client(router_connection(address, token_file, tls, tls_ca))


def open_admin(address: str | None, token_file: Path | None, tls: bool, tls_ca: Path | None) -> AdminClient:
    """A client of the scheduler; the caller closes it."""
    return AdminClient(connect_to(address, service="scheduler", token_file=token_file, tls=tls, tls_ca=tls_ca))
