"""API keys, roles and the interceptor: who is let in, as whom, and to what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

from router.settings import RouterSettings
from service.auth import check_binding, may_call, read_token
from service.errors import Reason, from_rpc_error
from service.keys import ApiKeys, Authenticator, Caller, Role
from service.server import PUBLIC_MESSAGE_BYTES, Server
from service.settings import CommonSettings, SettingsError, parse

ALICE, BOB, ROOT = "alice-key-0123456789", "bob-key-0123456789#x", "root-key-0123456789"
FILE = f"""# who may use the routers
{ALICE} alice

{BOB}   bob  client   # a # inside a word is part of it
{ROOT} operations admin
"""
TOKEN = "cluster-token-of-enough-characters"


def test_a_file_of_keys() -> None:
    keys = ApiKeys.parse(FILE)
    assert keys.find(ALICE) == Caller("alice", Role.CLIENT)
    assert keys.find(BOB) == Caller("bob", Role.CLIENT)
    assert keys.find(ROOT) == Caller("operations", Role.ADMIN)
    assert keys.find(ALICE[:-1]) is None
    assert keys.find("") is None
    assert ALICE not in repr(keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no key"),
        ("# nothing\n", "no key"),
        (f"{ALICE}\n", "line 1: KEY TENANT"),
        (f"\n{ALICE} alice client more\n", "line 2: KEY TENANT"),
        ("short alice\n", "at least 16"),
        ("schlüssel-0123456789 alice\n", "ASCII"),
        (f"{ALICE} al/ice\n", "tenant"),
        (f"{ALICE} {'a' * 65}\n", "tenant"),
        (f"{ALICE} alice root\n", "'root' is none of client, admin"),
        (f"{ALICE} alice\n{ALICE} bob\n", "line 2: the key stands"),
    ],
)
def test_a_wrong_file_is_one_sentence_without_the_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        ApiKeys.read(path)
    assert ALICE not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        ApiKeys.read(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="decode"):
        ApiKeys.read(tmp_path / "binary")


def test_keys_themselves_stand_in_a_variable_of_their_own() -> None:
    for text in (FILE, FILE.replace("\n", ","), f" {ALICE} alice ,{BOB} bob"):
        assert ApiKeys.listed(text).find(ALICE) == Caller("alice", Role.CLIENT)
        assert ApiKeys.listed(text).find(BOB) == Caller("bob", Role.CLIENT)
    env = {"OCTAVO_API_KEY_LIST": FILE, "OCTAVO_SCHEDULER": "h:1"}
    settings = parse(RouterSettings, "router", [], env)
    assert settings.api_key_list == FILE and ALICE not in repr(settings)
    with pytest.raises(SettingsError, match="--api-keys and OCTAVO_API_KEY_LIST"):
        parse(RouterSettings, "router", ["--api-keys", "keys"], env)
    for argv in (["--api-key-list", ALICE], [f"--api-key-list={ALICE}"], [ALICE]):  # nor on the command line
        with pytest.raises(SettingsError, match="unrecognized arguments: ") as caught:
            parse(RouterSettings, "router", argv, env)
        assert ALICE not in str(caught.value)
    with pytest.raises(SettingsError, match="OCTAVO_API_KEY_LIST: line 2: a key has at least 16"):
        ApiKeys.listed(f"{ALICE} alice,short bob")


@pytest.mark.parametrize(
    "given",
    [
        ALICE,
        f"{ALICE} alice",
        FILE,
        f"{ALICE} alice,{BOB} bob",
        f"ab/{ALICE}",
        f"/{ALICE}/x",
        ALICE * 300,
        f"{ALICE}\0",
    ],
)
def test_keys_that_are_taken_for_a_file_are_not_shown(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    for read, flag in ((ApiKeys.read, "--api-keys"), (read_token, "--cluster-token-file")):
        with pytest.raises(SettingsError) as caught:
            read(Path(given))
        text = str(caught.value)
        assert "alice" not in text and "Errno" not in text and "\n" not in text
        assert text.startswith(f"{flag} (or OCTAVO_{flag[2:].upper().replace('-', '_')}) takes the name of a file")


def test_a_role_that_is_a_key_is_not_shown() -> None:
    with pytest.raises(ValueError, match="line 1: the role is none of client, admin"):
        ApiKeys.parse(f"0123456789abcdef alice {ALICE}")


def test_a_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        ApiKeys.read(tmp_path / "absent")
    assert str(caught.value) == f"--api-keys {tmp_path / 'absent'}: No such file or directory"
    with pytest.raises(SettingsError) as caught:
        read_token(tmp_path)
    assert str(caught.value) == f"--cluster-token-file {tmp_path}: Is a directory"


def test_who_shows_what() -> None:
    both = Authenticator(TOKEN, ApiKeys.parse(FILE))
    assert both.identify(f"Bearer {ALICE}") == Caller("alice", Role.CLIENT)
    assert both.identify(f"bearer {TOKEN}") == Caller("default", Role.ADMIN)
    for nothing in (None, "", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}", "Bearer wrong", "Bearer schlüssel"):
        assert both.identify(nothing) is None
    assert Authenticator(TOKEN).identify(f"Bearer {ALICE}") is None
    assert Authenticator(None, ApiKeys.parse(FILE)).identify(f"Bearer {TOKEN}") is None
    assert Authenticator().identify(None) == Caller("default", Role.ADMIN)


def test_a_missing_secret_and_a_wrong_one_are_told_apart() -> None:
    for authenticator, what, wanted in (
        (Authenticator(None, ApiKeys.parse(FILE)), "key", "an API key"),
        (Authenticator(TOKEN, ApiKeys.parse(FILE)), "key", "an API key"),
        (Authenticator(TOKEN), "token", "the cluster token"),
    ):
        for nothing in (None, "", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}"):
            assert authenticator.refusal(nothing).startswith(f"no {what} was given: {wanted} is needed")
        text = authenticator.refusal("Bearer guess")
        assert text.startswith(f"this {what} is not known: {wanted} of this server") and "guess" not in text


def test_off_loopback_keys_are_as_good_as_a_token() -> None:
    outside = CommonSettings(listen="0.0.0.0:0")
    with pytest.raises(SettingsError, match="--api-keys"):
        check_binding(outside, None)
    check_binding(outside, None, has_keys=True)


def test_a_method_that_nobody_thought_of_is_for_admins() -> None:
    for method in ("/octavo.v1.InferenceService/Generate", "/grpc.reflection.v1alpha.ServerReflection/Info"):
        assert may_call(Role.CLIENT, method)
    for method in ("/octavo.v1.SchedulerService/DrainWorker", "/octavo.v1.InferenceServiceX/Y", "/new.Service/Method"):
        assert not may_call(Role.CLIENT, method)
        assert may_call(Role.ADMIN, method)


class _Inference(inference_pb2_grpc.InferenceServiceServicer):
    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse()


class _Scheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    async def ListWorkers(self, request: Any, context: Any) -> scheduler_pb2.ListWorkersResponse:
        return scheduler_pb2.ListWorkersResponse()


@asynccontextmanager
async def serving(keys: ApiKeys) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    """A server with keys that has a public service and one for admins."""
    server = Server(CommonSettings(), (), PUBLIC_MESSAGE_BYTES, keys)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(), server.grpc)
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(_Scheduler(), server.grpc)
    try:
        async with grpc.aio.insecure_channel(await server.start()) as channel:
            yield server, channel
    finally:
        await server.stop(None)


async def outcome(call: Any, secret: str | None) -> Reason | None:
    """The reason of the refusal; None: it was let in."""
    metadata = () if secret is None else (("authorization", f"Bearer {secret}"),)
    try:
        await call(metadata)
    except grpc.aio.AioRpcError as error:
        decoded = from_rpc_error(error)
        assert decoded is not None, error
        return decoded.reason
    return None


def test_what_a_stranger_sends_is_not_even_parsed() -> None:
    parsed: list[int] = []

    async def main() -> None:
        class Spying:
            """A message class, as far as the server looks at it."""

            DESCRIPTOR = inference_pb2.ListModelsRequest.DESCRIPTOR

            def FromString(self, data: bytes) -> inference_pb2.ListModelsRequest:
                parsed.append(len(data))
                return inference_pb2.ListModelsRequest()

        async def behaviour(request: Any, context: Any) -> inference_pb2.ListModelsResponse:
            return inference_pb2.ListModelsResponse()

        server = Server(CommonSettings(), (), PUBLIC_MESSAGE_BYTES, ApiKeys.parse(FILE))
        handler = grpc.unary_unary_rpc_method_handler(
            behaviour, Spying().FromString, inference_pb2.ListModelsResponse.SerializeToString
        )
        name = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
        server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Spy": handler}),))
        try:
            async with grpc.aio.insecure_channel(await server.start()) as channel:
                spy = channel.unary_unary(f"/{name}/Spy")

                async def call(metadata: Any) -> None:
                    await spy(b"\x08" + b"\xff" * 100, metadata=metadata)

                assert await outcome(call, None) is Reason.UNAUTHENTICATED
                assert await outcome(call, "wrong") is Reason.UNAUTHENTICATED
                assert parsed == []
                assert await outcome(call, ALICE) is None
                assert parsed == [101]
        finally:
            await server.stop(None)

    asyncio.run(main())


def test_each_method_over_grpc() -> None:
    async def main() -> None:
        async with serving(ApiKeys.parse(FILE)) as (server, channel):
            inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            scheduler: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            health: Any = health_pb2_grpc.HealthStub(channel)

            async def public(metadata: Any) -> None:
                await inference.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)

            async def admin(metadata: Any) -> None:
                await scheduler.ListWorkers(scheduler_pb2.ListWorkersRequest(), metadata=metadata)

            for secret in (None, "wrong", TOKEN):
                assert await outcome(public, secret) is Reason.UNAUTHENTICATED
                assert await outcome(admin, secret) is Reason.UNAUTHENTICATED
            assert await outcome(public, ALICE) is None
            assert await outcome(admin, ALICE) is Reason.PERMISSION_DENIED
            assert await outcome(public, ROOT) is None
            assert await outcome(admin, ROOT) is None
            await health.Check(health_pb2.HealthCheckRequest())
            server.authenticator.keys = ApiKeys.parse(f"{ROOT} operations\n")  # as after SIGHUP
            assert await outcome(public, ALICE) is Reason.UNAUTHENTICATED
            assert await outcome(admin, ROOT) is Reason.PERMISSION_DENIED

    asyncio.run(main())
