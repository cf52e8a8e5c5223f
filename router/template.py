"""Chat templates: a model's jinja2 program that turns a conversation into its prompt, in a sandbox.

The environment is that of transformers (`utils/chat_template_utils.py`, release 5): immutable sandbox, trimmed blocks,
loop controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, `{% generation %}` blocks. The rendered
text is tokenized without the tokenizer's own special tokens, as transformers does, so a template that writes BOS never
gets a second one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from router.template_limits import BoundedEnvironment

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_SOURCE_CHARACTERS = 1 << 20


class TemplateFailure(Exception):
    """The template can't render this conversation; the text says why."""


class ChatTemplate:
    """One model's template, compiled. Rendering keeps no state, so threads may share it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`variables`: the names that it looks up. Raises TemplateFailure where the source is no template."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._environment = _environment()
        if len(source) > _MAX_SOURCE_CHARACTERS:
            raise TemplateFailure(f"the model's chat template has more than {_MAX_SOURCE_CHARACTERS} characters")
        try:
            self._template = self._environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(self._environment.parse(source)))
        except Exception as error:  # noqa: BLE001 - besides jinja's own, what Python's compiler says to code that is nested too deeply
            raise TemplateFailure(f"the model's chat template can't be compiled: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        now: datetime | None = None,
    ) -> str:
        """The prompt of a conversation. `now` is what `strftime_now` shows (default: the local time). Raises TemplateFailure."""
        conversation = [dict(message) for message in messages]
        final = ""
        if continue_final_message:
            final = str(conversation[-1].get("content") or "") if conversation else ""
            if not final:
                raise TemplateFailure("continue_final_message needs a last message with content")
            conversation[-1]["content"] = final + _TAG
        variables = self._special_tokens | dict(template_args or {})
        if now is not None:
            variables["strftime_now"] = now.strftime
        try:
            with self._environment.budget():
                rendered = self._template.render(
                    variables,
                    messages=conversation,
                    tools=list(tools) if tools else None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                )
            rendered.encode()  # a lone surrogate is no text
        except Exception as error:  # noqa: BLE001 - a template is a program: whatever it raises is its answer to this conversation
            raise TemplateFailure(f"the chat template refused the conversation: {error}") from None
        return _cut_at_tag(rendered, final) if continue_final_message else rendered


def _cut_at_tag(rendered: str, final: str) -> str:
    """Everything before the tag that was put after the last message; its trailing white space as the template left it."""
    at = rendered.rfind(_TAG.strip())
    if at < 0 or final.strip() not in rendered:
        raise TemplateFailure("the chat template does not show the last message as it is, so it can't be continued")
    if rendered[at : at + len(_TAG)] == _TAG:
        return rendered[:at]
    # The template strips messages, so the tag lost its last space: then the content would have been stripped, too.
    return rendered[:at].rstrip()


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = environment.bounded("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's own text for training; here it renders as it stands."""

    tags = {"generation"}  # noqa: RUF012 - the attribute of jinja2's base class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render", [])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
