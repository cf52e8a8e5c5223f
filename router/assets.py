"""A model's text side: tokenizer, chat template, defaults. Built from the bytes of its files, found by model digest."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from octavo.v1 import inference_pb2
from tokenizers import Tokenizer

from router import chat as chats
from router.detokenize import TokenTable, UnsupportedDecoder, build_table
from router.speech.dialect import THINK, THOUGHT, Dialect, find_dialect
from router.template import SPECIAL_TOKENS, ChatTemplate, TemplateFailure
from router.validate import too_long
from service.errors import FieldViolation, OctavoError, Reason
from service.grammar import eos_token_ids

log = logging.getLogger("octavo.router.assets")

Files = Mapping[str, bytes]
_KEEP_UNSERVED = 4
_LONG_TEXT = 8_192  # characters


class AssetError(Exception):
    """Files that make no usable tokenizer; the text names the file."""


@dataclass(frozen=True, slots=True)
class ModelAssets:
    """What the router knows of one model digest. Immutable, so that threads may share it."""

    files: Files
    tokenizer: Tokenizer
    plain_tokenizer: Tokenizer  # writes special tokens in the text as ordinary text
    table: TokenTable
    template: ChatTemplate | None
    tool_template: ChatTemplate | None
    template_problem: str
    dialect: Dialect  # of the template for tools, where there is one
    eos_token_ids: tuple[int, ...]
    generation_config: Mapping[str, Any]
    normalizes: bool

    @classmethod
    def load(cls, files: Files) -> ModelAssets:
        """Parse and unroll everything; a tenth of a second or so for a large vocabulary. Raises AssetError."""
        if "tokenizer.json" not in files:
            raise AssetError("tokenizer.json is missing")
        config, tokenizer_config, generation = (
            _json(files, name) for name in ("config.json", "tokenizer_config.json", "generation_config.json")
        )
        template, tool_template, problem = _templates(files, tokenizer_config)
        shown = tool_template or template
        dialect = Dialect() if shown is None else find_dialect(shown)
        try:
            tokenizer = _tokenizer(files["tokenizer.json"])
            plain = _tokenizer(files["tokenizer.json"])
            plain.encode_special_tokens = True
            table = build_table(tokenizer, dialect.marks)
            opening, closing = tokenizer.token_to_id(THINK), tokenizer.token_to_id(THOUGHT)
            if dialect.thinks and opening is not None and closing is not None:
                dialect = replace(dialect, thought_tokens=(opening, closing))
        except UnsupportedDecoder as error:
            raise AssetError(str(error)) from None
        except BaseException as error:
            if not is_tokenizer_error(error):
                raise
            raise AssetError(f"tokenizer.json: {error}") from None
        return cls(
            files=files,
            tokenizer=tokenizer,
            plain_tokenizer=plain,
            table=table,
            template=template,
            tool_template=tool_template,
            template_problem=problem,
            dialect=dialect,
            eos_token_ids=eos_token_ids(config, generation, tokenizer_config, tokenizer.token_to_id),
            generation_config=generation,
            normalizes=json.loads(files["tokenizer.json"]).get("normalizer") is not None,
        )

    def encode_text(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Text to ids; special tokens written in it are not recognised.

        Raises PROMPT_TOO_LONG beyond `most` tokens, UNSUPPORTED where the tokenizer fails.
        """
        return _encode(self.plain_tokenizer, text, add_special_tokens, most, "text")

    def render(self, chat: inference_pb2.Chat, now: datetime | None = None) -> str:
        """The prompt of a conversation as text. Raises INVALID_ARGUMENT."""
        tools = chats.tools(chat)
        template = self._template_for(tools)
        if template is None:
            raise _refused(self.template_problem)
        try:
            return template.render(
                chats.messages(chat),
                tools=tools,
                template_args=chats.template_args(chat),
                add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
                continue_final_message=chat.continue_final_message,
                now=now,
            )
        except TemplateFailure as error:
            raise _refused(str(error)) from None

    def takes(self, variable: str, chat: inference_pb2.Chat) -> bool:
        """Whether the template of this conversation looks this variable up."""
        template = self._template_for(chats.tools(chat) if self.tool_template is not None else ())
        return template is not None and variable in template.variables

    def _template_for(self, tools: Sequence[Any]) -> ChatTemplate | None:
        return (self.tool_template if tools else None) or self.template

    def encode_rendered(self, prompt: str, most: int | None = None) -> list[int]:
        """A rendered template to ids: special tokens are recognised, none are added. Raises as encode_text does."""
        return _encode(self.tokenizer, prompt, False, most, "chat.messages")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Ids to text, as `Tokenizer.decode` does."""
        detokenizer = self.table.detokenizer(skip_special_tokens)
        text, _ = detokenizer.feed(token_ids)
        return text + detokenizer.finish()[0]

    @property
    def max_characters_a_token(self) -> int:
        """Of a text, that one token can stand for: it has no more bytes than the longest one.

        Normalization can shorten a text (NFC: to a third at most), so a tokenizer with one gets three times as much.
        """
        return self.table.max_token_bytes * (3 if self.normalizes else 1)


class AssetStore:
    """Assets by digest, fetched and loaded once. Owned by the event loop; the loading runs in `executor`."""

    def __init__(self, fetch: Callable[[bytes], Awaitable[Files]], executor: Executor) -> None:
        self._fetch = fetch
        self._executor = executor
        self._tasks: dict[bytes, asyncio.Task[ModelAssets]] = {}

    def ready(self, digest: bytes) -> bool:
        """Whether `get` would answer at once."""
        task = self._tasks.get(digest)
        return task is not None and task.done() and not task.cancelled() and task.exception() is None

    def want(self, digests: set[bytes]) -> None:
        """These are served now: begin to load those that are missing or failed, and forget the oldest of the others.

        A few others are kept, since a scheduler that restarts takes its models away only for a moment.
        """
        unserved = [d for d in self._tasks if d not in digests]
        for digest in unserved[: max(0, len(unserved) - _KEEP_UNSERVED)]:
            self._tasks.pop(digest).cancel()
        for digest in digests:
            self._task(digest)

    async def get(self, digest: bytes) -> ModelAssets:
        """The assets, once they are there. Raises NO_WORKER where they can't be had and UNSUPPORTED where they can't be used."""
        task = self._task(digest)
        try:
            return await asyncio.shield(task)
        except AssetError as error:
            raise OctavoError(Reason.UNSUPPORTED, f"the model can't be served as text: {error}") from None
        except asyncio.CancelledError:
            if task.cancelled():
                raise OctavoError(Reason.NO_WORKER, "the model is no longer served") from None
            raise

    async def close(self) -> None:
        """Cancel what is still loading."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _task(self, digest: bytes) -> asyncio.Task[ModelAssets]:
        task = self._tasks.get(digest)
        failed = task is not None and task.done() and (task.cancelled() or isinstance(task.exception(), OctavoError))
        if task is None or failed:
            task = asyncio.get_running_loop().create_task(self._load(digest))
            task.add_done_callback(_log_failure)
            self._tasks[digest] = task
        return task

    async def _load(self, digest: bytes) -> ModelAssets:
        files = await self._fetch(digest)
        return await asyncio.get_running_loop().run_in_executor(self._executor, ModelAssets.load, files)


def _log_failure(task: asyncio.Task[ModelAssets]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.warning("a model's assets can't be loaded: %s", task.exception())


def _refused(why: str) -> OctavoError:
    """A conversation that no prompt can be made of."""
    field = "chat.messages"
    return OctavoError(Reason.INVALID_ARGUMENT, f"{field}: {why}", violations=[FieldViolation(field, why)])


def is_tokenizer_error(error: BaseException) -> bool:
    """Whether the Rust library may have raised it: bare Exception for every kind of bad file, and its panics are no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool, most: int | None, field: str) -> list[int]:
    """`encode` holds Python's lock, for seconds where the text is long, and with it the event loop; `encode_batch` does not.

    To make a list of the ids holds it, too: so their number is looked at first.
    """
    try:
        if len(text) < _LONG_TEXT:
            encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:
            (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    except BaseException as error:
        if not is_tokenizer_error(error):
            raise
        raise OctavoError(Reason.UNSUPPORTED, f"the model's tokenizer fails on this text: {error}") from None
    if most is not None and len(encoding) > most:
        raise too_long(field, f"{len(encoding)} prompt tokens exceed the model's context of {most} tokens")
    ids: list[int] = encoding.ids
    return ids


def _tokenizer(data: bytes) -> Tokenizer:
    tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _json(files: Files, name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise AssetError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise AssetError(f"{name}: no JSON object")
    return value


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _templates(files: Files, tokenizer_config: dict[str, Any]) -> tuple[ChatTemplate | None, ChatTemplate | None, str]:
    """Default template, template for tools, and why there is none. A file of its own goes before the key, as in transformers."""
    special = {name: text for name in SPECIAL_TOKENS if (text := _token_text(tokenizer_config.get(name))) is not None}
    sources: dict[str, str] = {}
    found = tokenizer_config.get("chat_template")
    if isinstance(found, str):
        sources["default"] = found
    elif isinstance(found, list):
        named = [item for item in found if isinstance(item, dict) and "name" in item and "template" in item]
        sources = {str(item["name"]): str(item["template"]) for item in named}
    if "chat_template.json" in files:
        sources["default"] = str(_json(files, "chat_template.json").get("chat_template", ""))
    if "chat_template.jinja" in files:
        sources["default"] = files["chat_template.jinja"].decode(errors="replace")
    if not sources.get("default"):
        return None, None, "the model has no chat template: send text or token_ids"
    try:
        tool_source = sources.get("tool_use")
        tool_template = ChatTemplate(tool_source, special) if tool_source else None
        return ChatTemplate(sources["default"], special), tool_template, ""
    except TemplateFailure as error:
        return None, None, str(error)
