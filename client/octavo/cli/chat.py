"""`octavo chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

import typer
from octavo.cli import options
from octavo.cli.generate import chosen_options
from octavo.cli.problem import sentence
from octavo.cli.terminal import Answer, stderr_console
from octavo.client import Client, GenerateOptions, OctavoError

HELP = """/system TEXT  begin anew with this system message
/reset        begin anew
/help         show this
/quit         end (so does Ctrl-D)
Ctrl-C        stop the answer that is being written"""


@dataclass(slots=True)
class Conversation:
    """The turns so far, and how they are continued."""

    client: Client
    options: GenerateOptions
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Stream the answer to one more user's turn. After an error the turn is as if never asked. Raises OctavoError."""
        head = [("system", self.system)] if self.system else []
        answer = Answer()
        console = stderr_console()
        interrupted = False
        try:
            with self.client.chat([*head, *self.turns, ("user", text)], **self.options) as stream:
                answer.write(stream)
        except KeyboardInterrupt:
            interrupted = True
        except OctavoError:
            if answer.text:
                print(flush=True)
            raise
        print(flush=True)
        console.print(("stopped; " if interrupted else "") + answer.summary(), style="dim")
        # What was said before Ctrl-C belongs to the conversation, too.
        self.turns += [("user", text), ("assistant", answer.text)]

    def reset(self, system: str | None) -> None:
        """Forget the turns."""
        self.turns.clear()
        self.system = system


def chat(
    model: options.Model = "",
    message: Annotated[
        str | None, typer.Option("--message", "-M", help="Ask this one thing, print the answer and end.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
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
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    with options.open_client(address, token_file, tls, tls_ca) as client:
        conversation = Conversation(client, chosen_options(given), system)
        if message is not None:
            conversation.ask(message)
            return
        _converse(conversation, interactive=sys.stdin.isatty())


def _converse(conversation: Conversation, *, interactive: bool) -> None:
    console = stderr_console()
    if interactive:
        import readline  # noqa: F401 - gives input() line editing and history

        console.print("/help shows the commands", style="dim")
    while True:
        try:
            line = _read_line(interactive)
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D ends", style="dim")
            continue
        if line is None:
            return
        if line.startswith("/"):
            if not _command(conversation, line):
                return
        elif line:
            try:
                conversation.ask(line)
            except OctavoError as error:
                if not interactive:
                    raise
                console.print(f"error: {sentence(error)}", style="red", markup=False)


def _read_line(interactive: bool) -> str | None:
    """The next line without its end, or None at the end of the input."""
    if interactive:
        try:
            return input("\n> ").strip()
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _command(conversation: Conversation, line: str) -> bool:
    """Run a /command. Returns whether the conversation goes on."""
    console = stderr_console()
    name, _, argument = line.partition(" ")
    if name == "/quit":
        return False
    if name == "/reset":
        conversation.reset(conversation.system)
        console.print("a new conversation", style="dim")
    elif name == "/system":
        conversation.reset(argument.strip() or None)
        console.print("a new conversation" + ("" if argument.strip() else " without system message"), style="dim")
    elif name == "/help":
        console.print(HELP, markup=False)
    else:
        console.print(f"no command {name}; /help shows them", style="red", markup=False)
    return True
