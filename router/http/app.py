"""The routes, and what they have in common: who may call them, and how their errors are told."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from router.collect import check_size, size_of
from router.http.ask import Ask, Options, check_text
from router.http.body import Bodies, Gone, Receive, Scope, Send, header, skip_body
from router.http.chat import ChatView, read_chat
from router.http.completions import CompletionView, read_completions
from router.http.errors import HttpError, Names, Problem, problem_of
from router.http.models import TokenizeAsk, detokenize, model_list, one_model, read_detokenize, tokenize
from router.http.responses import ResponseView, read_responses
from router.http.settle import settle
from router.http.stream import Streams, headers_of
from router.http.tasks import together, while_connected
from router.http.view import View
from router.inference import Inference
from router.prepare import Prepared, TextPool
from service.errors import OctavoError, Reason
from service.keys import Authenticator, Caller, Role

Answer = Callable[[Scope, Receive, Send, Caller], Awaitable[None]]
_LARGE = 64 << 10  # bytes of messages: about a millisecond to write as JSON
_WRITTEN = 1 << 20  # bytes of an answer that are written at once
_NOBODY = Caller("", Role.CLIENT)
_USE_POST = "POST a question here; GET is for going on with its stream, by last-event-id"


class Gateway:
    """What the routes share. Owned by the event loop."""

    def __init__(
        self,
        inference: Inference,
        pool: TextPool,
        authenticator: Authenticator,
        registry: CollectorRegistry,
        keep_alive: float = 15.0,
    ) -> None:
        """`keep_alive`: seconds of silence after which a stream gets a comment."""
        self.inference = inference
        self.streams = Streams(keep_alive)
        self.ready = False
        self._pool = pool
        self._bodies = Bodies(pool)
        self._authenticator = authenticator
        self._registry = registry

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            self._route("/v1/chat/completions", ("GET", "POST"), self._chat),
            self._route("/v1/completions", ("GET", "POST"), self._completions),
            self._route("/v1/responses", ("GET", "POST"), self._responses),
            self._route("/v1/models", ("GET",), self._models),
            self._route("/v1/models/{name:path}", ("GET",), self._model),
            self._route("/tokenize", ("POST",), self._tokenize),
            self._route("/detokenize", ("POST",), self._detokenize),
            self._route("/version", ("GET",), self._version),
            self._route("/metrics", ("GET",), self._metrics, role=Role.ADMIN),
            self._route("/health", ("GET",), self._health, role=None),
            self._route("/ready", ("GET",), self._readiness, role=None),
        ]
        handlers: dict[Any, Any] = {HTTPException: self._no_route, Exception: _defect}
        inner = Starlette(routes=routes, exception_handlers=handlers)
        inner.router.redirect_slashes = False

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            scope["octavo.send"] = send  # not wrapped, for what is sent token by token
            await inner(scope, receive, send)

        return application

    def _route(self, path: str, methods: tuple[str, ...], answer: Answer, role: Role | None = Role.CLIENT) -> Route:
        """`role`: what a caller has to be at least; None lets everybody in."""
        return Route(
            path,
            _Endpoint(answer, self._authenticator, role),
            methods=list(methods),
        )

    # ---- generation

    async def _chat(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        if await self._resumed(scope, receive, send, caller):
            return
        options = Options.read(scope)
        ask = await self._bodies.read(scope, receive, lambda body: read_chat(body, options))
        await self._answer(ask, ChatView(ask), caller, scope, receive, send)

    async def _completions(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        if await self._resumed(scope, receive, send, caller):
            return
        options = Options.read(scope)
        ask = await self._bodies.read(scope, receive, lambda body: read_completions(body, options))
        await self._answer(ask, CompletionView(ask), caller, scope, receive, send)

    async def _responses(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        if await self._resumed(scope, receive, send, caller):
            return
        options = Options.read(scope)

        def read(body: dict[str, Any]) -> tuple[Ask, ResponseView]:
            ask = read_responses(body, options)
            return ask, ResponseView(ask, body)

        ask, view = await self._bodies.read(scope, receive, read)
        await self._answer(ask, view, caller, scope, receive, send)

    async def _resumed(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> bool:
        """Whether the client came again for a stream that it knows, and was served. What its body says was said before."""
        event_id = header(scope, b"last-event-id")
        if event_id is None:
            if scope["method"] == "POST":
                return False
            raise HttpError(Problem(405, _USE_POST, headers=(("allow", "POST"),)))
        await skip_body(scope, receive)
        if self.inference.draining:
            raise OctavoError(Reason.DRAINING, "this router is shutting down")
        job = self.streams.resume(event_id, self.inference, caller.tenant, scope, send)
        await while_connected(scope, receive, job)
        return True

    async def _answer(self, ask: Ask, view: View, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not ask.stream:
                check_size(ask.requests)
            await settle(ask, self.inference)
            if ask.stream:
                job = self.streams.run(ask, view, self.inference, caller.tenant, scope, send)
                await while_connected(scope, receive, job)
            else:
                answers = await while_connected(scope, receive, self._complete(ask, caller.tenant))
                text = await self._written(sum(map(size_of, answers)), lambda: view.answer(answers))
                await _send(send, Response(text, media_type="application/json"), headers_of(answers[0]))
        except OctavoError as error:
            raise HttpError(problem_of(error, ask.names)) from None

    async def _complete(self, ask: Ask, tenant: str) -> list[Any]:
        inference = self.inference
        deadline = None if ask.timeout is None else inference.hub.now() + ask.timeout

        def prepared(one: Prepared) -> None:
            ask.manner = one.manner

        return await together(inference.complete(request, tenant, deadline, prepared) for request in ask.requests)

    async def _written(self, size: int, write: Callable[[], bytes]) -> bytes:
        """What `write` makes of messages of `size` bytes; in a thread if that takes long."""
        return write() if size < _LARGE else await self._pool.run(0, write)

    # ---- the others

    async def _models(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        await _send(send, JSONResponse(model_list(self.inference)))

    async def _model(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        await _send(send, JSONResponse(one_model(self.inference, scope["path_params"]["name"])))

    async def _tokenize(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        ask = await self._bodies.read(scope, receive, TokenizeAsk.read)
        size, write = await tokenize(ask, self.inference)
        await _send(send, Response(await self._written(size, write), media_type="application/json"))

    async def _detokenize(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        request = await self._bodies.read(scope, receive, read_detokenize)
        size, write = await detokenize(request, self.inference)
        await _send(send, Response(await self._written(size, write), media_type="application/json"))

    async def _version(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        await _send(send, JSONResponse({"version": _version()}))

    async def _metrics(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        text = await asyncio.get_running_loop().run_in_executor(None, generate_latest, self._registry)
        await _send(send, Response(text, headers={"content-type": CONTENT_TYPE_LATEST}))

    async def _health(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        await _send(send, JSONResponse({"status": "ok"}))

    async def _readiness(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        status = {"status": "ready" if self.ready else "not ready"}
        await _send(send, JSONResponse(status, 200 if self.ready else 503))

    async def _no_route(self, request: Request, error: Exception) -> Response:
        """404 and 405; to strangers 401, so that they learn nothing of what there is."""
        assert isinstance(error, HTTPException)
        authorization = header(request.scope, b"authorization")
        if self._authenticator.identify(authorization) is None:
            return _response(_stranger(self._authenticator.refusal(authorization)))
        text = {
            404: f"there is no {request.url.path[:200]}; GET /v1/models lists the models that are served",
            405: f"{request.method} is not for {request.url.path[:200]}",
        }
        allow = tuple((error.headers or {}).items())
        return _response(Problem(error.status_code, text.get(error.status_code, error.detail), headers=allow))


class _Endpoint:
    """An ASGI application for one route: it knows the caller, and its errors are told."""

    def __init__(self, answer: Answer, authenticator: Authenticator, role: Role | None) -> None:
        self._answer = answer
        self._authenticator = authenticator
        self._role = role

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send, self._caller(scope))
            return
        except Gone:
            return
        except HttpError as error:
            problem = error.problem
            _forget(error)
        except OctavoError as error:
            problem = problem_of(error)
            _forget(error)
        except UnicodeEncodeError as error:
            problem = check_text(error).problem
            _forget(error)
        await _send(send, _response(problem))

    def _caller(self, scope: Scope) -> Caller:
        if self._role is None:
            return _NOBODY
        authorization = header(scope, b"authorization")
        caller = self._authenticator.identify(authorization)
        if caller is None:
            raise HttpError(_stranger(self._authenticator.refusal(authorization)))
        if self._role is Role.ADMIN and caller.role is not Role.ADMIN:
            raise OctavoError(Reason.PERMISSION_DENIED, "this is for admins")
        return caller


def _forget(error: BaseException) -> None:
    """An exception keeps every frame that it passed, and a task's own keeps the task: cycles, in which a refused request of megabytes
    would stay until the collector of cycles comes.
    """
    following: BaseException | None = error
    while following is not None:
        error, following = following, following.__context__
        error.__traceback__ = error.__context__ = error.__cause__ = None


def _stranger(why: str) -> Problem:
    return problem_of(OctavoError(Reason.UNAUTHENTICATED, why), Names())


def _response(problem: Problem) -> Response:
    return Response(problem.body(), problem.status, dict(problem.headers), "application/json")


async def _send(send: Send, response: Response, more: list[tuple[bytes, bytes]] | None = None) -> None:
    headers = [*response.raw_headers, *(more or ())]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    body, at = response.body, 0
    while len(body) - at > _WRITTEN:  # a loop that is given megabytes copies them all before it does anything else
        await send({"type": "http.response.body", "body": body[at : at + _WRITTEN], "more_body": True})
        at += _WRITTEN
    await send({"type": "http.response.body", "body": body[at:]})


async def _defect(request: Request, error: Exception) -> Response:
    """Starlette raises it again, for the log."""
    return _response(Problem(500, "the request ended with an internal error"))


def _version() -> str:
    try:
        return importlib.metadata.version("octavo")
    except importlib.metadata.PackageNotFoundError:  # from a checkout
        return "unknown"
