"""`octavo chat`: its /commands, texts of several lines, files, and a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from octavo.cli.chat import read_text
from octavo.cli.conversation import SETTABLE, Conversation
from octavo.cli.main import app
from octavo.cli.problem import CommandProblem
from octavo.client import Client
from octavo.v1.inference_pb2 import SamplingParams
from typer.testing import CliRunner, Result

from router.validate import Violations, check_sampling
from service.errors import OctavoError, Reason
from tests.unit.client_fake_router import FakeRouter, Play, whole_text

_ROOT = Path(__file__).parents[2]
ANSWER = whole_text(6)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster of this checkout, no settings of this user."""
    monkeypatch.chdir(tmp_path)
    for name in ("OCTAVO_ADDRESS", "OCTAVO_CLUSTER_TOKEN_FILE", "OCTAVO_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def chat(router: FakeRouter, lines: str, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["chat", "--address", router.address, *arguments], input=lines, env={"COLUMNS": "200"}
    )


def asked(router: FakeRouter) -> list[list[str]]:
    return [[turn.content[0].text for turn in request.chat.messages] for request in router.requests]


def test_retry_replaces_the_answer() -> None:
    with FakeRouter() as router:
        result = chat(router, "/retry\nfirst\n/retry\nsecond\n/clear\n/retry\n")
        assert asked(router) == [["first"], ["first"], ["first", ANSWER, "second"]]
    assert result.stderr.count("nothing was asked yet") == 2


def test_retry_asks_again_what_failed_and_keeps_an_old_answer_when_it_fails() -> None:
    plays = [
        Play(refuse=OctavoError(Reason.POISON, "no")),
        Play(),
        Play(refuse=OctavoError(Reason.POISON, "no")),
        Play(),
    ]
    with FakeRouter(plays) as router, Client(router.address) as client:
        conversation = Conversation(client, {})
        with pytest.raises(Exception, match="POISON"):
            conversation.ask("one")
        conversation.retry()
        with pytest.raises(Exception, match="POISON"):
            conversation.retry()
        assert conversation.turns == [("user", "one"), ("assistant", ANSWER)]
        conversation.retry()
        assert conversation.turns == [("user", "one"), ("assistant", ANSWER)]
        assert asked(router) == [["one"]] * 4


def test_set_changes_options_until_it_is_taken_back() -> None:
    lines = "/set temperature 0.5\n/set top_k 3\na\n/set temperature\n/set\nb\n/set top_k many\n/set colour red\n/set\n"
    with FakeRouter() as router:
        result = chat(router, lines, "-t", "1")
        first, second = (request.sampling for request in router.requests)
    assert (first.temperature, first.top_k) == (0.5, 3)
    assert not second.HasField("temperature") and second.top_k == 3
    assert "top_k: 'many' is no whole number" in result.stderr
    assert "'colour' is none of model, temperature" in result.stderr
    assert result.stderr.splitlines()[-1] == "top_k 3"


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("temperature", ("0", "99"), ("-1", "nan", "inf")),
        ("top_p", ("0.01", "1"), ("0", "1.1")),
        ("top_k", ("0", "2147483647"), ("-1", "2147483648")),
        ("min_p", ("0", "1"), ("-0.1", "1.1")),
        ("repetition_penalty", ("1e-6", "1e6"), ("0", "1.1e6")),
        ("presence_penalty", ("-2", "2"), ("-2.1", "2.1")),
        ("frequency_penalty", ("-2", "2"), ("-2.1", "2.1")),
        ("max_tokens", ("1", "4294967295"), ("0", "-1", "4294967296")),
        ("min_tokens", ("0", "4294967295"), ("-1", "4294967296")),
        ("seed", ("0", "18446744073709551615"), ("-1", "18446744073709551616")),
    ],
)
def test_set_takes_what_the_router_takes(name: str, taken: tuple[str, ...], refused: tuple[str, ...]) -> None:
    with Client("127.0.0.1:1") as client:
        conversation = Conversation(client, {})
        for value in taken:
            conversation.set(name, value)
            assert _router_takes(name, value)
        for value in refused:
            with pytest.raises(CommandProblem, match=f"^{name} {value}: must be "):
                conversation.set(name, value)
            assert conversation.options == {name: SETTABLE[name](taken[-1])}
            assert not _router_takes(name, value)


def _router_takes(name: str, value: str) -> bool:
    wrong = Violations()
    try:
        check_sampling(SamplingParams(**{name: SETTABLE[name](value)}), wrong)
    except ValueError:  # no request could hold it
        return False
    return not wrong.found


def test_model_shows_what_is_served_and_chooses() -> None:
    with FakeRouter() as router:
        result = chat(router, "/model absent\n/model fake\nhi\n")
        assert [request.model for request in router.requests] == ["fake"]
    assert "no model 'absent' is served" in result.stderr and "* fake" in result.stderr


def test_a_conversation_is_saved_and_goes_on_from_its_file(tmp_path: Path) -> None:
    with FakeRouter() as router:
        chat(router, "/set seed 7\nfirst\n/save talk.json\n/load absent.json\n/save\n", "-s", "be brief")
        result = chat(router, "/history\n/retry\n", "--load", "talk.json", "-t", "0")
        assert asked(router)[-1] == ["be brief", "first"]
        assert (router.requests[-1].sampling.seed, router.requests[-1].sampling.HasField("temperature")) == (7, True)
        chat(router, "/load talk.json\nsecond\n/save talk.json\n")
        assert asked(router)[-1] == ["be brief", "first", ANSWER, "second"]
    assert "system: be brief" in result.stderr and "user: first" in result.stderr
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 4


def test_save_overwrites_no_other_file_and_load_takes_none(tmp_path: Path) -> None:
    other = tmp_path / "thesis.txt"
    other.write_text("my life's work")
    wrong = {"kind": "octavo conversation", "version": 1, "system": None, "options": {}, "messages": []}
    with Client("127.0.0.1:1") as client:
        conversation = Conversation(client, {"seed": 3}, turns=[("user", "a"), ("assistant", "b")], asked="a")
        for call in (conversation.save, conversation.load):
            with pytest.raises(CommandProblem, match="no conversation"):
                call(other)
        for fault in (
            {"version": 2},
            {"messages": [{"role": "tool", "content": ""}]},
            {"messages": 3},
            {"options": {"colour": "red"}},
            {"options": {"seed": "x"}},
            {"system": 5},
        ):
            (tmp_path / "talk").write_text(json.dumps(wrong | fault))
            with pytest.raises(CommandProblem, match="talk"):
                conversation.load(tmp_path / "talk")
        with pytest.raises(CommandProblem, match="No such file"):
            conversation.save(tmp_path / "absent" / "talk")
    assert other.read_text() == "my life's work"
    assert (conversation.options, conversation.asked, len(conversation.turns)) == ({"seed": 3}, "a", 2)


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (["one", " two "], ["one", "two"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (['"""', "  def f():", "", "/quit", '"""', "after"], ["  def f():\n\n/quit", "after"]),
        (["a\\"], ["a"]),  # the input ends in the middle: what is there is asked
        (['"""', "open"], ["open"]),
    ],
)
def test_texts_of_several_lines(lines: list[str], texts: list[str]) -> None:
    typed = iter(lines)
    found = []
    while (text := read_text(lambda prompt: next(typed, None))) is not None:
        found.append(text)
    assert found == texts


def test_a_text_of_several_lines_is_one_question_even_if_it_begins_like_a_command() -> None:
    with FakeRouter() as router:
        chat(router, '"""\n/quit\nis a command\n"""\nline one\\\nline two\n')
        assert asked(router) == [["/quit\nis a command"], ["/quit\nis a command", ANSWER, "line one\nline two"]]


class Terminal:
    """`octavo chat` in a pseudo-terminal, as somebody types into it."""

    def __init__(self, router: FakeRouter, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(_ROOT / "protos"), str(_ROOT / "client"))),
            "TERM": "xterm",
            "OCTAVO_ADDRESS": router.address,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "octavo.cli.main", "chat", *arguments],
            stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, again: str = "") -> None:
        """Read until `text` was shown since the last call; what came up to it is taken. `again` is typed every now and then."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            left = max(0.0, deadline - time.monotonic())
            if select.select([self._master], [], [], min(left, 2.0) if again else left)[0]:
                self.shown += os.read(self._master, 65536).decode(errors="replace")
            else:
                assert again and left, self.shown
                self.type(again)
        self.shown = self.shown.partition(text)[2]

    def close(self) -> int:
        code = self.process.wait(60)
        os.close(self._master)
        return code


def _own_terminal() -> None:
    """Make the pseudo-terminal the controlling one, so that typed control characters become signals."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def stalling() -> Iterator[FakeRouter]:
    """Its first answer never ends, the others do."""
    with FakeRouter([Play(hang_at=4), Play()]) as router:
        yield router


def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(stalling: FakeRouter, tmp_path: Path) -> None:
    terminal = Terminal(stalling, "--history", "typed")
    try:
        terminal.wait_for("> ")
        terminal.type("first\r")
        terminal.wait_for(whole_text(4).strip())
        terminal.type("\x03")
        terminal.wait_for("stopped; 4 tokens")
        terminal.wait_for("> ")
        assert stalling.cancelled.acquire(timeout=20)
        terminal.type("half a line\x03")
        # readline sleeps through a signal that comes between its prompt and its wait, until another key is pressed.
        terminal.wait_for("/quit or Ctrl-D ends", again="\x03")
        terminal.wait_for("> ")
        terminal.type("\x1b[A\r")  # arrow up brings the line before
        terminal.wait_for("tokens/s")
        terminal.wait_for("> ")
        terminal.type("/he\t\r")
        terminal.wait_for("stop the answer that is being written")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.close() == 0
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
    assert asked(stalling) == [["first"], ["first", whole_text(4), "first"]]
    history = tmp_path / "typed"
    assert [line.strip() for line in history.read_text().splitlines()] == ["first", "/help"]
    assert history.stat().st_mode & 0o777 == 0o600
