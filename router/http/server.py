"""The HTTP listener: uvicorn's protocol on the process's own event loop, with our lifecycle instead of uvicorn's."""

from __future__ import annotations

import asyncio
import functools
import ssl
from email.utils import formatdate

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from router.http.protocol import HttpProtocol, Limits
from service.binding import not_bound, patiently
from service.server import HANDSHAKE_MS
from service.settings import CommonSettings, SettingsError, split_address

_BACKLOG = 2_048


class HttpServer:
    """One listener and its connections. Owned by the event loop that starts it; `keep_time` must run meanwhile."""

    def __init__(self, app: ASGIApp, settings: CommonSettings, listen: str, limits: Limits | None = None) -> None:
        """`listen`: HOST:PORT. TLS is that of `settings`."""
        self._settings = settings
        self._listen = listen
        self._limits = limits or Limits()
        self._state = ServerState()
        self._config = Config(
            app, log_config=None, log_level="error", access_log=False, lifespan="off", ws="none", proxy_headers=False,
            server_header=False, interface="asgi3",
        )  # fmt: skip
        self._server: asyncio.Server | None = None
        self.address = ""

    async def start(self, stopping: asyncio.Event | None = None) -> str:
        """Bind and serve; returns HOST:PORT. Raises SettingsError. `stopping`: a taken address is waited for no longer."""
        host, port = split_address(self._listen)
        self._config.load()
        loop = asyncio.get_running_loop()
        protocol = functools.partial(
            HttpProtocol, self._limits, config=self._config, server_state=self._state, app_state={}, _loop=loop
        )
        context = _tls(self._settings)

        async def bind() -> asyncio.Server:
            try:
                return await loop.create_server(
                    protocol,
                    host,
                    port,
                    ssl=context,
                    ssl_handshake_timeout=HANDSHAKE_MS / 1e3 if context else None,
                    backlog=_BACKLOG,
                )
            except OSError as error:
                raise not_bound("--http-listen", self._listen, error) from None

        self._server = await patiently(bind, stopping)
        bound = self._server.sockets[0].getsockname()[1]
        self.address = f"{self._listen.rpartition(':')[0]}:{bound}"
        return self.address

    async def keep_time(self) -> None:
        """The Date header, once a second. Until cancelled."""
        while True:
            self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            await asyncio.sleep(1.0)

    async def stop(self, grace: float) -> None:
        """Take no connection any more, let answers end and arrive for `grace` seconds, then hang up."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        await self._until_gone(grace)
        for connection in list(self._state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        if self._state.tasks:  # they hear that their clients are gone
            await asyncio.wait(list(self._state.tasks), timeout=grace)
        for task in self._state.tasks:
            task.cancel()
        await self._server.wait_closed()

    async def _until_gone(self, seconds: float) -> None:
        """At most so long. An answer that ended may still be in its connection's buffer, which closes when that is empty."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self._state.tasks or self._state.connections:
            ends = [one.gone for one in self._state.connections if isinstance(one, HttpProtocol)]
            if (left := deadline - loop.time()) <= 0:
                return
            await asyncio.wait([*self._state.tasks, *ends], timeout=left)


def _tls(settings: CommonSettings) -> ssl.SSLContext | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"--tls-cert {settings.tls_cert}: {error}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context
