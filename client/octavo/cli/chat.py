"""`octavo chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from octavo.cli import options
from octavo.cli.chat_commands import COMMANDS, run_command
from octavo.cli.conversation import Conversation
from octavo.cli.generate import chosen_options
from octavo.cli.problem import CommandProblem, sentence
from octavo.cli.terminal import stderr_console
from octavo.client import OctavoError

_QUOTES = '"""'
_HISTORY_LINES = 1_000

ReadLine = Callable[[str], str | None]
"""The next line without its end, after a prompt; None at the end of the input."""


def chat(
    model: options.Model = "",
    message: Annotated[
        str | None, typer.Option("--message", "-M", help="Ask this one thing, print the answer and end.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    load: Annotated[
        Path | None,
        typer.Option(help="Go on with a conversation that /save wrote; options given here go before its own."),
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="Keep the lines typed in this file, for the arrow keys of later conversations.")
    ] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    address: options.Address = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """Talk with a model. Type /help for the commands."""
    given = {
        "model": model or None,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    with options.open_client(address, token_file, tls, tls_ca) as client:
        conversation = Conversation(client, chosen_options(given), system)
        if load is not None:
            conversation.load(load)
            conversation.options |= chosen_options(given)
            conversation.system = system if system is not None else conversation.system
        if message is not None:
            conversation.ask(message)
            return
        # Before anything is typed: is a router there, and has it such a model?
        client.tokenize("?", model=str(conversation.options.get("model") or ""))
        if sys.stdin.isatty():
            with _line_editing(history):
                converse(conversation, interactive=True)
        else:
            converse(conversation, interactive=False)


def converse(conversation: Conversation, *, interactive: bool) -> None:
    """Questions and /commands until the end of the input. From a pipe, the first error ends it: raises as `ask` does."""
    console = stderr_console()
    if interactive:
        console.print("/help shows the commands", style="dim")
    read_line = _typed_line if interactive else _piped_line
    while True:
        try:
            text = read_text(read_line)
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.print("\n/quit or Ctrl-D ends", style="dim")
            continue
        if text is None:
            return
        try:
            if text.startswith("/") and "\n" not in text:
                if not run_command(conversation, text):
                    return
            elif text:
                conversation.ask(text)
        except (OctavoError, CommandProblem) as error:
            if not interactive and isinstance(error, OctavoError):
                raise
            console.print(f"error: {sentence(error)}", style="red", markup=False, soft_wrap=True)
        except KeyboardInterrupt:  # in a /command that asks the router; an answer handles its own
            if not interactive:
                raise
            console.print("stopped", style="dim")


def read_text(read_line: ReadLine) -> str | None:
    """One text: a line, lines that a backslash joins, or what stands between two lines of three quotes. None at the end."""
    line = read_line("\n> ")
    if line is None:
        return None
    lines: list[str] = []
    if line.strip() == _QUOTES:
        while (more := read_line("… ")) is not None and more.strip() != _QUOTES:
            lines.append(more)
        return "\n".join(lines)
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = read_line("… ")
    return "\n".join([*lines, *([] if line is None else [line])]).strip()


def _typed_line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        print()
        return None


def _piped_line(prompt: str) -> str | None:
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


@contextmanager
def _line_editing(history: Path | None) -> Iterator[None]:
    """Arrow keys, and tab for the names of commands; `history` is read now and written at the end. Raises CommandProblem."""
    try:
        import readline  # gives input() its line editing
    except ModuleNotFoundError:  # a Python that was built without it
        yield
        return
    names = [*COMMANDS, "/quit"]

    def complete(text: str, number: int) -> str | None:
        fitting = [name for name in names if text.startswith("/") and name.startswith(text)]
        return fitting[number] if number < len(fitting) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    if history is not None:
        try:
            # Made at once and for this user only: questions are nobody else's business.
            history.touch(mode=0o600, exist_ok=True)
            readline.read_history_file(history)
        except OSError as error:
            raise CommandProblem(f"{history}: {error.strerror or error}") from None
        readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        if history is not None:
            readline.write_history_file(history)
