"""`octavo generate`, `tokenize` and `models`: one call each."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from octavo.cli import options
from octavo.cli.problem import NO_MODEL, CommandProblem
from octavo.cli.terminal import Answer, stderr_console, stdout_console
from octavo.client import GenerateOptions
from rich.table import Table

_STRUCTURE = "Structure (at most one)"

Prompt = Annotated[str, typer.Argument(help="Text to continue; '-' reads it from standard input.", show_default=False)]


def generate(
    prompt: Prompt,
    model: options.Model = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Send it as a user's message through the chat template.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Say on stderr how fast it was.")] = False,
    timeout: options.Timeout = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            help="File with a JSON schema that the output follows; {} means any JSON.", rich_help_panel=_STRUCTURE
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that the whole output matches.", rich_help_panel=_STRUCTURE)
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(help="The output is this, or another --choice.", rich_help_panel=_STRUCTURE),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(help="File with a grammar in Lark syntax that the output follows.", rich_help_panel=_STRUCTURE),
    ] = None,
    address: options.Address = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """Continue a text and stream what comes to standard output."""
    text = read_text(prompt)
    given = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
        "ignore_eos": ignore_eos,
        "json_schema": read_file(json_schema),
        "regex": regex,
        "choice": choice,
        "lark": read_file(grammar),
    }
    chosen = chosen_options(given)
    with options.open_client(address, token_file, tls, tls_ca) as client:
        stream = (
            client.chat([("user", text)], timeout=timeout, **chosen)
            if chat
            else client.generate(text, timeout=timeout, **chosen)
        )
        answer = Answer()
        with stream:
            try:
                answer.write(stream)
            finally:
                if answer.text:
                    print(flush=True)
        if stats:
            stderr_console().print(answer.summary(), style="dim")


def chosen_options(given: Mapping[str, object]) -> GenerateOptions:
    """What was given on the command line, without what was not."""
    return {name: value for name, value in given.items() if value is not None}  # type: ignore[return-value]


def read_text(argument: str) -> str:
    """The argument itself, or for '-' all of standard input."""
    if argument != "-":
        return argument
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise CommandProblem(f"standard input is not UTF-8: {error}") from None


def read_file(path: Path | None) -> str | None:
    """The text of a file that an option names."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandProblem(f"{path} is not UTF-8: {error}") from None
    except OSError as error:
        raise CommandProblem(f"{path}: {error.strerror}") from None


def tokenize(
    text: Annotated[str, typer.Argument(help="Text; '-' reads it from standard input.", show_default=False)],
    model: options.Model = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Send it as a user's message through the chat template.")
    ] = False,
    special: Annotated[bool, typer.Option(help="Add the tokenizer's own BOS and EOS.")] = True,
    count: Annotated[bool, typer.Option("--count", help="Print only how many there are.")] = False,
    address: options.Address = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """Print the token ids of a text, as generating would see them."""
    content = read_text(text)
    with options.open_client(address, token_file, tls, tls_ca) as client:
        if chat:
            response = client.tokenize(messages=[("user", content)], model=model)
        else:
            response = client.tokenize(content, model=model, add_special_tokens=special)
    print(len(response.token_ids) if count else " ".join(map(str, response.token_ids)))


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    address: options.Address = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """List the models that can be asked for now."""
    with options.open_client(address, token_file, tls, tls_ca) as client:
        found = client.list_models()
    if as_json:
        fields = ("name", "digest", "max_model_len", "vocab_size", "workers", "ready", "quantization")
        print(json.dumps([{field: getattr(model, field) for field in fields} for model in found], indent=2))
        return
    table = Table("model", "context", "vocabulary", "quantization", "workers", "ready", "digest")
    for model in found:
        table.add_row(
            model.name,
            f"{model.max_model_len:,}",
            f"{model.vocab_size:,}",
            model.quantization or "none",
            str(model.workers),
            "yes" if model.ready else "no",
            model.digest[:12],
        )
    stdout_console().print(table if found else NO_MODEL)
