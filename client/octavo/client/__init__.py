"""The Python client of Octavo.

    with Client() as client:
        for text in client.generate("Once upon a time", max_tokens=64).text():
            print(text, end="", flush=True)

`AsyncClient` is the same with `async with`, `async for` and `await`. A stream that breaks is resumed at another router of the
client's list: no token is missing and none comes twice.
"""

from octavo.client.aio import AsyncClient, AsyncStream
from octavo.client.connection import Connection, ConnectionProblem
from octavo.client.errors import FieldViolation, OctavoError, Reason
from octavo.client.request import GenerateOptions, Message
from octavo.client.retry import RetryPolicy
from octavo.client.session import Event
from octavo.client.sync import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Connection",
    "ConnectionProblem",
    "Event",
    "FieldViolation",
    "GenerateOptions",
    "Message",
    "OctavoError",
    "Reason",
    "RetryPolicy",
    "Stream",
]
