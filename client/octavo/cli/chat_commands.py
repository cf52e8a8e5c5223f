"""The /commands of `octavo chat`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from octavo.cli.conversation import SETTABLE, Conversation
from octavo.cli.problem import NO_MODEL, CommandProblem
from octavo.cli.terminal import printable, stderr_console

HELP = """/system TEXT     begin anew with this system message; without TEXT, without one
/clear, /reset   begin anew
/retry           ask the last question again, in place of its answer
/set NAME VALUE  change an option, such as temperature 0; without VALUE, back to the model's own; alone, show them
/model NAME      talk with another model from now on; without NAME, show which there are
/history         show the conversation so far
/save FILE       write the conversation to a file
/load FILE       go on with one from a file
/help            show this
/quit            end (so does Ctrl-D)
Ctrl-C           stop the answer that is being written, or drop what is typed
A line that ends with a backslash goes on in the next one; a text of many lines stands between two lines of three quotes: \"\"\""""


def run_command(conversation: Conversation, line: str) -> bool:
    """Run a /command. Returns whether the conversation goes on. Raises CommandProblem, OctavoError."""
    name, _, argument = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    command = COMMANDS.get(name)
    if command is None:
        raise CommandProblem(f"no command {name}; /help shows them")
    command(conversation, argument.strip())
    return True


def _say(text: str) -> None:
    stderr_console().print(printable(text), style="dim", markup=False, soft_wrap=True)


def _help(conversation: Conversation, argument: str) -> None:
    stderr_console().print(HELP, markup=False)


def _clear(conversation: Conversation, argument: str) -> None:
    conversation.reset(conversation.system)
    _say("a new conversation")


def _system(conversation: Conversation, argument: str) -> None:
    conversation.reset(argument or None)
    _say("a new conversation" + ("" if argument else " without system message"))


def _retry(conversation: Conversation, argument: str) -> None:
    conversation.retry()


def _set(conversation: Conversation, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name:
        conversation.set(name, value.strip() or None)
    chosen = ", ".join(f"{key} {value}" for key, value in conversation.options.items())
    _say(chosen or f"all as the model's own; there are {', '.join(SETTABLE)}")


def _model(conversation: Conversation, argument: str) -> None:
    served = conversation.client.list_models()
    if argument:
        if argument not in [model.name for model in served]:
            raise CommandProblem(f"no model {argument!r} is served; /model shows which are")
        conversation.set("model", argument)
    chosen = conversation.options.get("model")
    for model in served:
        _say(("* " if model.name == chosen else "  ") + model.name + ("" if model.ready else " (not ready)"))
    if not served:
        _say(NO_MODEL)


def _history(conversation: Conversation, argument: str) -> None:
    head = [("system", conversation.system)] if conversation.system else []
    for role, text in [*head, *conversation.turns]:
        _say(f"{role}: {text}")
    if not head and not conversation.turns:
        _say("nothing was said yet")


def _save(conversation: Conversation, argument: str) -> None:
    conversation.save(_path(argument))
    _say(f"{len(conversation.turns)} messages written to {_path(argument)}")


def _load(conversation: Conversation, argument: str) -> None:
    conversation.load(_path(argument))
    _say(f"{len(conversation.turns)} messages from {_path(argument)}; /history shows them")


def _path(argument: str) -> Path:
    if not argument:
        raise CommandProblem("name a file")
    return Path(argument).expanduser()


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/clear": _clear,
    "/help": _help,
    "/history": _history,
    "/load": _load,
    "/model": _model,
    "/reset": _clear,
    "/retry": _retry,
    "/save": _save,
    "/set": _set,
    "/system": _system,
}
