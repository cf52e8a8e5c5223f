"""A TCP relay that can hold its breath: what a partition or a broken cable looks like to the two who talk through it."""

from __future__ import annotations

import asyncio
import contextlib

_CHUNK = 1 << 16


class Gate:
    """Relays 127.0.0.1:port to `target`. Owned by the event loop that started it."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.address = ""
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port; `address` is known afterwards."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def hold(self) -> None:
        """Let no byte through, in either direction; nothing is lost and nobody is told."""
        self._open.clear()

    def release(self) -> None:
        """Let through what waited, and what comes."""
        self._open.set()

    def cut(self) -> None:
        """Break every connection."""
        for relay in self._relays:
            relay.cancel()

    async def close(self) -> None:
        """Stop listening and break every connection."""
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._relays, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        writers = [writer]
        try:
            await self._open.wait()
            host, _, port = self.target.rpartition(":")
            there, onward = await asyncio.open_connection(host, int(port))
            writers.append(onward)
            pumps = [asyncio.create_task(self._pump(reader, onward)), asyncio.create_task(self._pump(there, writer))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # nobody listens there: the caller sees its connection end
        finally:
            self._relays.discard(task)
            for each in writers:
                with contextlib.suppress(OSError):
                    each.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(_CHUNK):
            await self._open.wait()
            sink.write(data)
            await sink.drain()
