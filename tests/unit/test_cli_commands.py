"""The commands, run in this process against a scripted router."""

from __future__ import annotations

import json
import struct
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from octavo.cli import chat, inspect, serve, terminal
from octavo.cli.conversation import Conversation
from octavo.cli.main import app
from octavo.client import Client
from octavo.client.admin import Snapshot
from octavo.v1 import inference_pb2 as pb
from octavo.v1 import scheduler_pb2
from typer.testing import CliRunner, Result

from service.errors import OctavoError, Reason
from tests.unit.client_fake_router import DIGEST, FakeRouter, Play, whole_text


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster of this checkout, no settings of this user."""
    monkeypatch.chdir(tmp_path)
    for name in ("OCTAVO_ADDRESS", "OCTAVO_SCHEDULER", "OCTAVO_CLUSTER_TOKEN_FILE", "OCTAVO_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str, stdin: str | None = None, **env: str) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin, env={"COLUMNS": "200", **env})


def test_generate_streams_the_text() -> None:
    with FakeRouter() as router:
        result = run(
            "generate", "hi", "-n", "4", "--stop", "A", "--stop", "B", "--stats", OCTAVO_ADDRESS=router.address
        )
        assert (result.exit_code, result.stdout) == (0, whole_text(4) + "\n")
        assert "4 tokens" in result.stderr and "ended by length" in result.stderr
        request = router.requests[0]
        assert request.text == "hi"
        assert list(request.sampling.stop) == ["A", "B"]
        assert not request.sampling.HasField("temperature")


def test_generate_takes_a_grammar_of_each_kind(tmp_path: Path) -> None:
    schema, lark = tmp_path / "schema.json", tmp_path / "numbers.lark"
    schema.write_text('{"type": "integer"}')
    lark.write_text("start: /[0-9]+/")
    with FakeRouter() as router:
        for arguments in (
            ("--json-schema", str(schema)),
            ("--regex", "a+"),
            ("--choice", "yes", "--choice", "no"),
            ("--grammar", str(lark)),
        ):
            assert run("generate", "hi", *arguments, OCTAVO_ADDRESS=router.address).exit_code == 0
        grammars = [request.grammar for request in router.requests]
        assert grammars[0].json_schema == schema.read_text() and grammars[1].regex == "a+"
        assert list(grammars[2].choice.values) == ["yes", "no"] and grammars[3].lark == lark.read_text()
        both = run("generate", "hi", "--regex", "a", "--choice", "b", OCTAVO_ADDRESS=router.address)
        missing = run("generate", "hi", "--json-schema", "nowhere.json", OCTAVO_ADDRESS=router.address)
    assert both.exit_code == missing.exit_code == 1
    assert "at most one kind" in both.stderr and "nowhere.json" in missing.stderr


def test_generate_reads_stdin_and_uses_the_template() -> None:
    with FakeRouter() as router:
        assert run("generate", "-", "--chat", "--address", router.address, stdin="from a pipe").exit_code == 0
        (turn,) = router.requests[0].chat.messages
        assert (turn.role, turn.content[0].text) == ("user", "from a pipe")


def test_an_error_is_one_sentence_with_its_reason() -> None:
    play = Play(break_at=2, error=OctavoError(Reason.POISON, "it killed\nits workers"))
    with FakeRouter([play]) as router:
        result = run("generate", "hi", "--address", router.address)
    assert result.exit_code == 1
    assert result.stdout == whole_text(2) + "\n"
    assert result.stderr == "error: POISON: it killed its workers\n"


def test_nobody_there_is_one_sentence() -> None:
    result = run("models", "--address", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: UNAVAILABLE: ")
    assert result.stderr.count("\n") == 1
    assert "`make up`" in result.stderr


def test_another_service_at_the_address_is_one_sentence() -> None:
    """A scheduler's address is given for a router's, or the HTTP port for the one of gRPC."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        for command in ("generate", "hi", "--address"), ("workers", "--scheduler"):
            said = run(*command, f"127.0.0.1:{port}").stderr
            assert said.startswith("error: what answers at this address is another service") and "`make ps`" in said
    finally:
        server.stop(None).wait()


def test_an_address_that_speaks_no_grpc_is_one_sentence() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            said = run("models", "--address", f"127.0.0.1:{web.server_port}").stderr.splitlines()[-1]
        finally:
            web.shutdown()
            thread.join()
    assert said.startswith(f"error: what answers at 127.0.0.1:{web.server_port} speaks no gRPC") and "`make ps`" in said


def test_without_a_worker_it_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeRouter([Play(refuse=OctavoError(Reason.NO_WORKER, "no worker serves any model at present"))]) as router:
        said = run("generate", "hi", "--address", router.address).stderr
        monkeypatch.setattr(Client, "list_models", lambda client: [])
        listed = run("models", "--address", router.address).stdout
    assert said.startswith("error: NO_WORKER: no worker serves any model at present (`make worker`")
    assert listed.startswith("no model is served now; `make worker`")


def test_several_models_say_how_to_choose() -> None:
    play = Play(break_at=0, error=OctavoError(Reason.INVALID_ARGUMENT, "model: must be one of a, b"))
    with FakeRouter([play]) as router:
        result = run("generate", "hi", "--address", router.address)
    assert result.stderr == "error: INVALID_ARGUMENT: model: must be one of a, b (choose with --model)\n"


@pytest.mark.parametrize(
    ("said", "how"),
    [
        ("no key was given: an API key is needed", "give it by OCTAVO_API_KEY, or by --token-file FILE"),
        (
            "this token is not known: the cluster token …",
            "give it by OCTAVO_CLUSTER_TOKEN_FILE, or by --token-file FILE",
        ),
    ],
)
def test_a_refused_key_says_how_to_give_one(said: str, how: str) -> None:
    play = Play(break_at=0, error=OctavoError(Reason.UNAUTHENTICATED, said))
    with FakeRouter([play]) as router:
        result = run("generate", "hi", "--address", router.address)
    assert result.exit_code == 1 and result.stderr == f"error: UNAUTHENTICATED: {said} ({how})\n"


def test_a_prompt_that_no_message_holds_is_too_large() -> None:
    with FakeRouter() as router:
        result = run("generate", "-", "--address", router.address, stdin="x" * (17 << 20))
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: PROMPT_TOO_LONG: the prompt is too large: the request has 178")
    assert "may have 16777216" in result.stderr


def test_settings_errors_are_one_sentence() -> None:
    result = run("models", "--token-file", "absent")
    assert (result.exit_code, result.stderr) == (1, "error: absent: No such file or directory\n")


def test_wrong_usage_is_2() -> None:
    for arguments in (("generate",), ("generate", "x", "--max-tokens", "none"), ("nothing",), ("inspect", "--hz", "0")):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert "Usage" in result.stderr


def test_every_command_has_help() -> None:
    result = run("--help")
    for name in (
        "generate",
        "chat",
        "models",
        "tokenize",
        "pull",
        "convert",
        "serve",
        "workers",
        "inspect",
        "drain",
        "admit",
        "doctor",
    ):
        assert name in result.stdout
        assert run(name, "--help").exit_code == 0
    assert "OpenAI's API over HTTP is at port 50080" in run("serve", "--help").stdout


def test_tokenize_and_models() -> None:
    with FakeRouter() as router:
        assert run("tokenize", "ab", "--address", router.address).stdout == "97 98\n"
        assert run("tokenize", "ab", "--count", "--chat", "--address", router.address).stdout == "2\n"
        assert "fake" in run("models", "--address", router.address).stdout
        assert "int8" in run("models", "--address", router.address).stdout
        (model,) = json.loads(run("models", "--json", "--address", router.address).stdout)
        assert (model["digest"], model["ready"], model["quantization"]) == (DIGEST, True, "int8")


def test_chat_once() -> None:
    with FakeRouter() as router:
        result = run("chat", "-M", "hi", "-s", "be brief", "--address", router.address)
        assert result.stdout == whole_text(6) + "\n"
        assert "6 tokens" in result.stderr
        assert [(turn.role, turn.content[0].text) for turn in router.requests[0].chat.messages] == [
            ("system", "be brief"),
            ("user", "hi"),
        ]


def test_chat_keeps_the_turns_and_obeys_commands() -> None:
    lines = "first\nsecond\n/help\n/reset\nthird\n/system be kind\nfourth\n/nonsense\n\n/quit\nnever\n"
    with FakeRouter() as router:
        result = run("chat", "--address", router.address, stdin=lines)
        assert result.exit_code == 0
        asked = [[turn.content[0].text for turn in request.chat.messages] for request in router.requests]
    answer = whole_text(6)
    assert asked == [["first"], ["first", answer, "second"], ["third"], ["be kind", "fourth"]]
    assert "/reset" in result.stderr and "no command /nonsense" in result.stderr
    assert result.stdout == (answer + "\n") * 4


def test_chat_says_at_once_that_nobody_is_there_or_has_such_a_model() -> None:
    nobody = run("chat", "--address", "127.0.0.1:1", stdin="")
    assert nobody.exit_code == 1 and nobody.stderr.startswith("error: UNAVAILABLE: ")
    with FakeRouter(unary_errors=[OctavoError(Reason.MODEL_UNKNOWN, "no model named 'x'")]) as router:
        unknown = run("chat", "--model", "x", "--address", router.address, stdin="")
        assert [request.model for request in router.unary] == ["x"]
    assert unknown.exit_code == 1 and "no model named 'x'" in unknown.stderr


def test_chat_from_a_pipe_ends_with_its_input_and_with_its_first_error() -> None:
    with FakeRouter() as router:
        assert run("chat", "--address", router.address, stdin="").exit_code == 0
    with FakeRouter([Play(refuse=OctavoError(Reason.MODEL_UNKNOWN, "no such model"))]) as router:
        result = run("chat", "--address", router.address, stdin="a\nb\n")
        assert (result.exit_code, len(router.requests)) == (1, 1)


def test_chat_goes_on_after_an_error_and_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[str | type[BaseException]] = ["one", KeyboardInterrupt, "two", "three", EOFError]

    def type_next(prompt: str) -> str:
        item = typed.pop(0)
        if isinstance(item, str):
            return item
        raise item

    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    plays = [Play(refuse=OctavoError(Reason.POISON, "no")), Play(), Play()]
    with FakeRouter(plays) as router, Client(router.address) as client:
        conversation = Conversation(client, {})
        monkeypatch.setattr("builtins.input", type_next)
        monkeypatch.setattr(terminal, "printable", lambda text: interrupted(text) if len(typed) == 2 else text)
        chat.converse(conversation, interactive=True)
        asked = [[turn.content[0].text for turn in request.chat.messages] for request in router.requests]
    # "one" failed and is forgotten; the answer to "two" was stopped by Ctrl-C after its first piece, which is kept.
    assert asked == [["one"], ["two"], ["two", whole_text(2), "three"]]
    captured = capsys.readouterr()
    assert "POISON" in captured.err and "stopped" in captured.err


def test_a_terminal_is_not_sent_escape_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal.printable("\x1b[2Ja\nb\tc") == "\x1b[2Ja\nb\tc"  # a pipe gets what the model wrote
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal.printable("\x1b[2Ja\nb\tc\x9b") == "\N{REPLACEMENT CHARACTER}[2Ja\nb\tc\N{REPLACEMENT CHARACTER}"


def _status(name: str = "w0", incarnation: int = 5, **fields: Any) -> scheduler_pb2.WorkerStatus:
    return scheduler_pb2.WorkerStatus(
        name=name, incarnation=incarnation, model="m", model_digest=b"\xab", max_rows=8, blocks_total=100, **fields
    )


def _inspection(**fields: Any) -> scheduler_pb2.WorkerInspection:
    plan = scheduler_pb2.PlanSummary(step_id=7, num_tokens=12, decode_rows=3, chunk_rows=1)
    row = scheduler_pb2.RowInspection(row=2, num_prompt_tokens=10, block_ids=struct.pack("<3i", 4, 5, 6))
    return scheduler_pb2.WorkerInspection(status=_status(**fields), last_plan=plan, rows=[row])


def _message(*workers: scheduler_pb2.WorkerInspection, full: bool = False, gone: list[int] | None = None) -> Any:
    queue = scheduler_pb2.QueueStatus(waiting=3, waiting_tokens=99, counters={"preempted": 4})
    return scheduler_pb2.InspectResponse(full=full, uptime_ms=1000, queue=queue, workers=workers, gone=gone or [])


def test_workers() -> None:
    with FakeRouter(workers=[_status(draining=True, blocks_used=7, quantization="int8")]) as router:
        assert "int8" in run("workers", "--scheduler", router.address).stdout
        assert "draining" in run("workers", "--scheduler", router.address).stdout
        (worker,) = json.loads(run("workers", "--json", OCTAVO_SCHEDULER=router.address).stdout)
        assert (worker["incarnation"], worker["blocks_used"], worker["model_digest"]) == ("5", 7, "ab")
    with FakeRouter() as router:
        assert run("workers", "--scheduler", router.address).stdout == "no worker is enlisted\n"


def test_drain_finds_the_worker_by_name_or_incarnation() -> None:
    with FakeRouter(
        workers=[_status(), _status(name="w1", incarnation=6), _status(name="w1", incarnation=7)]
    ) as router:
        assert run("drain", _status().name, "--scheduler", router.address).exit_code == 0
        assert run("drain", f"{7:016x}", "--scheduler", router.address).exit_code == 0
        drained = [asked.incarnation for asked in router.unary if isinstance(asked, scheduler_pb2.DrainWorkerRequest)]
        assert drained == [_status().incarnation, 7]
        assert "2 workers are named" in run("drain", "w1", "--scheduler", router.address).stderr
        assert "no worker 'w9'" in run("drain", "w9", "--scheduler", router.address).stderr


def test_admit_takes_a_whole_digest() -> None:
    with FakeRouter() as router:
        assert run("admit", "m", "ab" * 32, "--scheduler", router.address).exit_code == 0
        assert router.unary[-1] == scheduler_pb2.AdmitDigestRequest(model="m", digest=b"\xab" * 32)
        for wrong in ("ab", "xy" * 32):
            assert "64 hexadecimal digits" in run("admit", "m", wrong, "--scheduler", router.address).stderr


def test_inspect_once_and_as_json() -> None:
    messages = [_message(_inspection(), full=True), _message(_inspection(name="w1", incarnation=6)), _message(gone=[5])]
    with FakeRouter(inspections=messages) as router:
        shown = run("inspect", "--rows", "--scheduler", router.address).stdout
        assert "waiting 3" in shown and "#7: 12 tokens" in shown and "4 5 6" in shown and "preempted 4" in shown
        (once,) = run("inspect", "--json", "--once", "--scheduler", router.address).stdout.splitlines()
        worker = json.loads(once)["workers"][0]
        assert worker["rows"][0]["block_ids"] == [4, 5, 6]
        assert worker["last_plan"]["step_id"] == 7
        lines = run("inspect", "--json", "--scheduler", router.address).stdout.splitlines()
        names = [[item["status"]["name"] for item in json.loads(line)["workers"]] for line in lines]
        assert names == [["w0"], ["w0", "w1"], ["w1"]]
    with FakeRouter() as router:
        assert run("inspect", "--once", "--scheduler", router.address).exit_code == 1


def test_inspect_needs_the_right_token() -> None:
    with FakeRouter(token="sixteen characters") as router:
        how = "give it by OCTAVO_CLUSTER_TOKEN_FILE, or by --token-file FILE"
        assert run("inspect", "--scheduler", router.address).stderr == f"error: UNAUTHENTICATED: no token ({how})\n"


def test_a_full_message_replaces_the_snapshot() -> None:
    snapshot = Snapshot()
    snapshot.update(_message(_inspection(), full=True))
    snapshot.update(_message(_inspection(incarnation=9), full=True))
    assert list(snapshot.workers) == [9]


@pytest.mark.parametrize(
    ("used", "cached", "bar"), [(0, 0, "·" * 16), (1, 1, "█▒" + "·" * 14), (100, 0, "█" * 16), (99, 1, "█" * 16)]
)
def test_block_occupancy(used: int, cached: int, bar: str) -> None:
    assert inspect.occupancy(_status(blocks_used=used, blocks_cached=cached)) == f"{bar} {used}+{cached}/100"


def test_pull_and_convert_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "octavo.models.pull", None)
    monkeypatch.setitem(sys.modules, "octavo.models.gguf_convert", None)
    for arguments in (("pull", "smollm2"), ("convert", "a.gguf", "out")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "pip install 'octavo[models]'" in result.stderr


def test_pull_and_convert_tell_what_is_wrong(tmp_path: Path) -> None:
    result = run("pull", "no-such-model", OCTAVO_CACHE=str(tmp_path))
    assert result.exit_code == 1
    assert "no-such-model" in result.stderr
    (tmp_path / "bad.gguf").write_bytes(b"not a gguf file")
    result = run("convert", "bad.gguf", "out")
    assert result.exit_code == 1
    assert "bad.gguf" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("serve", "/no/such"), ("chaos", "--model", "/no/such")])
def test_a_cluster_that_cannot_be_started_is_one_sentence(command: tuple[str, ...]) -> None:
    result = run(*command)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: no such directory: /no/such"


def test_serve_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "deploy").is_dir()])
    for name in [name for name in sys.modules if name == "deploy" or name.startswith("deploy.")]:
        monkeypatch.delitem(sys.modules, name)
    result = run("serve", "mock")
    assert result.exit_code == 1
    assert "checkout" in result.stderr


@pytest.mark.parametrize(("host", "listen"), [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7"), ("[::1]", "[::1]:7")])
def test_serve_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, host: str, listen: str) -> None:
    calls: list[tuple[str, Any]] = []
    module = types.ModuleType("deploy.cluster")
    module.ServeOptions = lambda **options: options  # type: ignore[attr-defined]
    module.serve = lambda model, options: calls.append((model, options)) or 3  # type: ignore[attr-defined,func-returns-value]
    monkeypatch.setitem(sys.modules, "deploy.cluster", module)
    options = "--max-model-len 512 --quantization none --workers 2 --port 7 --backend mock"
    options += f" --host {host}"
    result = run("serve", "mock", *options.split())
    assert result.exit_code == 3
    assert calls == [
        (
            "mock",
            {
                "workers": 2,
                "listen": listen,
                "backend": "mock",
                "served_name": None,
                "worker_flags": {"quantization": "none", "max_model_len": 512},
            },
        )
    ]


def test_the_checkout_is_found_from_inside(tmp_path: Path) -> None:
    root = Path(serve.__file__).parents[3]
    assert serve.find_checkout(root / "client" / "octavo") == root
    assert serve.find_checkout(tmp_path) is None


def test_the_summary_of_an_answer_without_tokens() -> None:
    answer = terminal.Answer()
    answer.write(iter([pb.Started(), pb.Finished()]))
    assert answer.summary() == "no tokens"
