"""What all processes share: settings, tokens, bindings, errors, columns."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from octavo.v1 import common_pb2

from service.auth import check_binding, read_token
from service.columns import check_range, pack, unpack
from service.errors import RULES, FieldViolation, OctavoError, Reason, answers_errors
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.settings import CommonSettings, SettingsError, flag, parse, split_address


@dataclass(frozen=True, kw_only=True)
class Example(CommonSettings):
    """An example."""

    peers: tuple[str, ...] = flag("repeatable", ())
    size: int = flag("a number", 3)
    eager: bool = flag("yes or no", False)


def test_flags_win_over_variables_and_variables_over_defaults() -> None:
    env = {"OCTAVO_SIZE": "5", "OCTAVO_PEERS": "a:1,b:2", "OCTAVO_EAGER": "yes", "OCTAVO_NAME": ""}
    settings = parse(Example, "example", ["--size", "7"], env)
    assert (settings.size, settings.peers, settings.eager, settings.name) == (7, ("a:1", "b:2"), True, None)
    assert parse(Example, "example", ["--peers", "x:1", "--peers", "y:2"], env).peers == ("x:1", "y:2")


def test_help_lists_the_values_of_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Example, "example", ["--help"], {})
    assert "level to log; one of debug, info, warning, error [info]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--size", "many"], "--size: 'many' is no int"),
        (["--eager", "maybe"], "--eager"),
        (["--log-level", "loud"], "none of debug"),
        (["--sise", "1"], "unrecognized arguments"),
        (["--heartbeat-ms", "500"], "below --lease-ms"),
        (["--tls-cert", "x"], "belong together"),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_names_it(argv: list[str], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        parse(Example, "example", argv, {})


@pytest.mark.parametrize("service", ["scheduler", "router", "worker"])
def test_a_service_refuses_bad_settings_with_code_2_and_no_traceback(service: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", service, "--lease-ms", "soon"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--lease-ms" in done.stderr


@pytest.mark.parametrize(
    "address", ["host", ":1", "host:", "host:70000", "host:x", "::1:80", "[::1:80", "a" * 64 + ".b:80", "a..b:80"]
)
def test_addresses_are_checked(address: str) -> None:
    with pytest.raises(SettingsError):
        split_address(address)
    assert split_address("[::1]:80") == ("::1", 80)


def test_off_loopback_a_token_is_needed(tmp_path: Path) -> None:
    outside = Example(listen="0.0.0.0:0")
    with pytest.raises(SettingsError, match="reachable from other machines"):
        check_binding(outside, None)
    check_binding(outside, "secret")
    check_binding(Example(listen="127.0.0.1:0"), None)
    check_binding(Example(listen="unix:/tmp/x"), None)
    short = tmp_path / "token"
    short.write_text("short")
    with pytest.raises(SettingsError, match="16 characters"):
        read_token(short)


@pytest.mark.parametrize("service", ["scheduler", "router", "worker"])
def test_metrics_off_loopback_are_refused_unless_the_network_is_said_to_be_private(service: str) -> None:
    argv = [sys.executable, "-m", service, "--metrics", "0.0.0.0:0"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--metrics 0.0.0.0:0 is reachable from other machines" in done.stderr and "--metrics-open" in done.stderr
    env = {"OCTAVO_METRICS": "0.0.0.0:0", "OCTAVO_METRICS_OPEN": "true"}
    assert parse(Example, "example", [], env).metrics_open
    with pytest.raises(SettingsError, match="--metrics"):
        parse(Example, "example", [], {**env, "OCTAVO_METRICS_OPEN": "false"})


def test_every_reason_of_the_contract_has_a_rule() -> None:
    names = {name.removeprefix("ERROR_REASON_") for name in common_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert names == set(Reason.__members__) == {reason.name for reason in RULES}
    assert all(common_pb2.ErrorReason.Value(f"ERROR_REASON_{reason.name}") == reason for reason in Reason)


def test_an_error_travels_with_its_details() -> None:
    error = OctavoError(Reason.QUEUE_FULL, "full", violations=[FieldViolation("a.b", "is bad")], retry_after_ms=1500)
    status = error.to_status()
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    found: dict[str, Any] = {}
    for detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if any_pb2.Any.Is(detail, message.DESCRIPTOR):
                detail.Unpack(message)
                found[kind.__name__] = message
    assert found["ErrorInfo"].reason == "QUEUE_FULL"
    assert found["BadRequest"].field_violations[0].field == "a.b"
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1500


def test_columns_are_little_endian_and_checked() -> None:
    assert pack([1, -1], np.int32) == b"\x01\0\0\0\xff\xff\xff\xff"
    assert unpack("c", b"\x01\0\0\0", np.int32, 1).tolist() == [1]
    with pytest.raises(OctavoError, match="whole number"):
        unpack("c", b"\0\0\0", np.int32)
    with pytest.raises(OctavoError, match="2 elements where 1 belong"):
        unpack("c", bytes(8), np.int32, 1)
    with pytest.raises(OctavoError, match="column c"):
        check_range("c", np.array([3]), 0, 3)


def test_what_a_process_starts_with_is_no_work_for_the_garbage_collector() -> None:
    async def main() -> None:
        Lifecycle("example", Example()).announce("127.0.0.1:1", "127.0.0.1:2")

    before = gc.get_freeze_count()
    try:
        asyncio.run(main())
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()


def test_a_process_announces_itself_drains_on_sigterm_and_leaves_with_0(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    argv = [sys.executable, "-m", "scheduler", "--listen", "127.0.0.1:0", "--ready-file", str(ready)]
    with subprocess.Popen(
        argv, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "ready:" in line:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert not ready.exists()


@pytest.mark.parametrize("text", ["m", "é", "\U0001f600", "\ud800"])
def test_an_error_fits_into_trailing_metadata_whatever_text_it_quotes(text: str) -> None:
    violations = [FieldViolation(text * 1_000, text * 10_000)] * 10_000
    error = OctavoError(Reason.INVALID_ARGUMENT, text * 1_000_000, violations=violations)
    status = error.to_status()
    assert len(urllib.parse.quote(status.message)) + 4 / 3 * status.ByteSize() < 7_000  # gRPC takes 8 KiB
    assert status.message.endswith("…") or text == "\ud800"
    assert OctavoError(Reason.INVALID_ARGUMENT, text).to_status().message in (text, "?")


def test_a_refused_request_is_freed_though_grpc_keeps_the_exception() -> None:
    class Request:
        pass

    class Context:
        """Keeps what ended the call, as gRPC does."""

        aborted: Exception

        async def abort_with_status(self, status: object) -> None:
            self.aborted = RuntimeError("aborted")
            raise self.aborted

    class Service:
        @answers_errors
        async def call(self, request: Request, context: Context) -> None:
            try:
                raise ValueError(request)
            except ValueError:
                raise OctavoError(Reason.INVALID_ARGUMENT, "no") from None

    async def main(context: Context) -> weakref.ref[Request]:
        request = Request()
        seen = weakref.ref(request)
        call = asyncio.ensure_future(Service().call(request, context))
        del request
        await asyncio.wait([call])
        assert isinstance(call.exception(), RuntimeError)
        return seen

    context = Context()
    gc.disable()
    try:
        assert asyncio.run(main(context))() is None
    finally:
        gc.enable()


def test_metrics_that_never_started_can_be_stopped() -> None:
    Metrics().stop()


def test_metrics_outlive_who_hangs_up_and_who_says_nothing(caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    metrics = Metrics()
    host, port = split_address(asyncio.run(metrics.start("127.0.0.1:0")))
    try:
        idle = [socket.create_connection((host, port), timeout=10) for _ in range(20)]
        assert [connection.recv(1) for connection in idle[16:]] == [b""] * 4  # hung up on: each would hold a thread
        for connection in idle:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        until, body = time.monotonic() + 10, b""
        while not body:
            try:
                body = urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=5).read()
            except OSError:
                assert time.monotonic() < until
        assert b"process_cpu_seconds_total" in body
    finally:
        metrics.stop()
    assert not caplog.records and capsys.readouterr().err == ""
