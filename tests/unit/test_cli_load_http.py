"""The load generator against servers that speak OpenAI's API well, badly, or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from octavo.cli.load_http import HttpStreams, first_model
from octavo.cli.load_process import Generator
from octavo.cli.load_spec import LoadSpec

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(*events: str) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(e.encode()), e.encode()) for e in events) + b"0\r\n\r\n"


def event(text: str = "", reason: str | None = None, **more: Any) -> str:
    choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
    return "data: " + json.dumps({"choices": choices} | more, separators=(",", ":")) + "\n\n"


USAGE = 'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n'
DONE = "data: [DONE]\n\n"
GOOD = HEAD + chunked(
    event(), event("a"), ": keep-alive\n\n", event("b"), event("c") + event("d"), event("", "length"), USAGE, DONE
)


def spec(port: int, **changes: Any) -> LoadSpec:
    values: dict[str, Any] = {
        "addresses": (f"http://127.0.0.1:{port}/v1",), "openai": True, "model": "m", "vocab_size": 9, "requests": 2, "concurrency": 1,
    }  # fmt: skip
    return LoadSpec(**values | changes)


def serving(pieces: list[bytes], use: Callable[[int], Any]) -> tuple[Any, list[bytes], int]:
    """What `use` returns at a server that answers each request with these pieces; the requests; the number of connections."""
    requests: list[bytes] = []
    connections = 0

    async def main() -> Any:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            while head := await reader.readline():
                length = 0
                while (line := await reader.readline()).strip():
                    head += line
                    if line.startswith(b"content-length"):
                        length = int(line.split()[1])
                requests.append(head + b"\r\n" + await reader.readexactly(length))
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if not b"".join(pieces).endswith(b"0\r\n\r\n"):
                    break
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        try:
            async with asyncio.timeout(20):
                return await use(server.sockets[0].getsockname()[1])
        finally:
            server.close()

    return asyncio.run(main()), requests, connections


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_is_timed_event_by_event(size: int) -> None:
    async def use(port: int) -> Any:
        generator = Generator(spec(port, temperature=0.0, output_len=7))
        await generator.connect()

        async def go() -> None:
            pass

        payloads = [generator._spec.request(index) for index in range(2)]
        await generator.run(payloads, go)
        await generator.close()
        return generator.samples

    pieces = [GOOD[at : at + size] for at in range(0, len(GOOD), size)]
    samples, requests, connections = serving(pieces, use)
    for sample in samples:
        assert sample.outcome == "finished" and sample.reason == ""
        assert len(sample.stamps) == 4 and sample.to_dict()["tokens"] == 7
    body = json.loads(requests[0].partition(b"\r\n\r\n")[2])
    assert (
        body["stream"] is True and body["max_tokens"] == 7 and len(body["prompt"]) == 64 and body["ignore_eos"] is True
    )
    assert requests[0].startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert connections == 1  # one after the other


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b'HTTP/1.1 429 X\r\ncontent-length: 46\r\n\r\n{"error": {"message": "full", "code": "busy"}}', "busy: full"),
        (b"HTTP/1.1 502 Bad\r\ncontent-length: 3\r\n\r\nbad", "HTTP 502: bad"),
        (HEAD + chunked(event("a"), 'data: {"error": {"message": "m", "code": "c"}}\n\n'), "c: m"),
        (HEAD + b"5\r\ndata:", "LOST: the stream ended before its end"),
        (b"", "LOST: the connection broke"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told(answer: bytes, problem: str) -> None:
    async def use(port: int) -> Any:
        streams = HttpStreams(spec(port))
        return await streams.stream(b"{}", lambda size: True)

    (told, _), _, _ = serving([answer], use)
    assert told == problem


def test_a_stream_can_be_abandoned_and_a_slow_one_times_out() -> None:
    async def abandon(port: int) -> Any:
        streams = HttpStreams(spec(port))
        seen: list[int] = []
        problem, _ = await streams.stream(b"{}", lambda size: len(seen) < 1 and not seen.append(size))  # type: ignore[func-returns-value]
        return problem, len(seen)

    assert serving([GOOD], abandon)[0] == ("", 1)

    async def wait(port: int) -> Any:
        return (await HttpStreams(spec(port, timeout=0.05)).stream(b"{}", lambda size: True))[0]

    async def hang() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        assert (await wait(server.sockets[0].getsockname()[1])).startswith("DEADLINE")
        server.close()

    asyncio.run(hang())


def test_the_first_model_is_found() -> None:
    body = b'{"data": [{"id": "mine"}]}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    async def use(port: int) -> Any:
        return await first_model(f"http://127.0.0.1:{port}/v1/", "secret")

    found, requests, _ = serving([answer], use)
    assert found == "mine"
    assert requests[0].startswith(b"GET /v1/models HTTP/1.1\r\n") and b"authorization: Bearer secret" in requests[0]
    with pytest.raises(ValueError, match="no http"):
        asyncio.run(first_model("127.0.0.1:80", None))
