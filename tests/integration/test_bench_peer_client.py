"""The client that measures servers, ours and others, by one method."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.peer_client import Share, send, summary
from deploy.cluster import LocalCluster

pytestmark = pytest.mark.xdist_group("cluster")

EVENT = b'data: {"choices":[{"text":"a"}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\n'
DONE = b"data: [DONE]\n\n"


def run(url: str, tmp_path: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "bench.peer_client", "--url", url, "--model", "mock", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    assert out.read_text(encoding="utf-8") == done.stdout
    return done, json.loads(done.stdout)


def test_all_requests_of_several_processes_finish_and_each_token_is_counted(tmp_path: Path) -> None:
    lease = {"lease-ms": 5000}
    with LocalCluster(redis=False, flags={"scheduler": lease, "router": lease, "worker": lease}) as cluster:
        url = f"http://{cluster.gateways[0]}"
        shape = ("--plen", "20", "--olen", "24", "--procs", "3", "--concurrency", "12", "--vocab", "30000")
        done, found = run(url, tmp_path, "--n", "50", "--rate", "200", *shape)
        assert done.returncode == 0, done.stderr
        assert (found["n"], found["failed"], found["out_tokens"], found["right_lengths"]) == (50, 0, 50 * 24, True)
        (tmp_path / "out.jsonl").unlink()
        done, found = run(url, tmp_path, "--n", "4", "--procs", "2", "--olen", "1000000")
        assert (done.returncode, found["n"], found["failed"]) == (1, 0, 4)
        assert "first error: ValueError: HTTP/1.1 400" in done.stderr
        assert "Traceback" not in cluster.members["router-1"].log_text()


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([EVENT + USAGE + DONE], ""),
        ([(EVENT + USAGE + DONE)[at : at + 7] for at in range(0, len(EVENT + USAGE + DONE), 7)], ""),
        ([EVENT, USAGE], "without its usage or its end"),
        ([EVENT, DONE], "without its usage or its end"),
        ([EVENT, b'data: {"error":{"message":"lost"}}\n\n'], "the stream broke"),
        ([EVENT, None], "IncompleteReadError"),
    ],
)
def test_a_stream_counts_where_it_is_whole(pieces: list[bytes | None], error: str) -> None:
    """However it is cut into chunks; None hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in pieces:
            if piece is None:
                writer.write(b"ff\r\nhalf of")
                break
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        else:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            (result,) = await asyncio.to_thread(send, Share("127.0.0.1", port, 1, 0.0, ((0.0, b"{}"),)))
        assert error in result.error
        assert bool(error) == bool(result.error)
        assert (result.tokens, len(result.times)) == (0 if error else 1, 1)
        assert summary([result], 1)["failed"] == int(bool(error))

    asyncio.run(main())
