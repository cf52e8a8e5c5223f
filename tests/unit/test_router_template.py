"""Chat templates render exactly as transformers renders them, and can't leave their sandbox."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from google.protobuf import struct_pb2
from octavo.v1 import inference_pb2
from transformers import PreTrainedTokenizerFast

from router import chat as chats
from router import template_limits
from router.template import ChatTemplate, TemplateFailure
from service.errors import OctavoError, Reason
from tests.fuzz.templates import HOSTILE
from tests.unit.router_fakes import CHATML, assets, byte_level_tokenizer

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}{% set content = message['content'] %}{% endif %}
    {% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" }}
    {%- else %}{{- "ipython\\n" + message.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
QWEN = """{%- set ns = namespace(last=messages|length - 1) %}{%- if tools %}{{- '<tools>' }}
{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- '</tools>' }}{%- endif %}
{%- for message in messages %}{%- if loop.index0 > 100 %}{%- break %}{%- endif %}
{%- if message.role == "assistant" %}{% generation %}{{ message.content }}{% endgeneration %}
{%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}{%- if tool_call.function %}
{%- set tool_call = tool_call.function %}{%- endif %}{{- '<tool_call>' ~ tool_call.name ~ (tool_call.arguments | tojson) }}
{%- endfor %}{%- endif %}{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
TALK = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "  hello 你好 "},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "again"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"days": 3, "ratio": 0.5, "é": "<b>"}}}]
CALLS = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"days": 2, "place": "Köln"}}}
        ],
    },
    {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
]


def reference(template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def to_chat(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **more: Any
) -> inference_pb2.Chat:
    chat = inference_pb2.Chat(**more)
    for message in messages:
        turn = chat.messages.add(role=message["role"], name=message.get("name", ""))
        turn.tool_call_id = message.get("tool_call_id", "")
        if message["content"]:
            turn.content.add(text=message["content"])
        for call in message.get("tool_calls", []):
            arguments = struct_pb2.Struct()
            arguments.update(call["function"]["arguments"])
            turn.tool_calls.add(id=call["id"], name=call["function"]["name"], arguments=arguments)
    for tool in tools or []:
        chat.tools.add().update(tool)
    return chat


@pytest.mark.parametrize("template", [CHATML, LLAMA_2, LLAMA_3, QWEN], ids=["chatml", "llama2", "llama3", "qwen"])
@pytest.mark.parametrize("generation", [True, False])
def test_renders_and_tokenizes_as_transformers(template: str, generation: bool) -> None:
    model = assets(chat_template__jinja=template.encode())
    chat = to_chat(TALK, add_generation_prompt=generation)
    expected = reference(template).apply_chat_template(TALK, tokenize=False, add_generation_prompt=generation)
    assert model.render(chat) == expected
    ids = reference(template).apply_chat_template(TALK, add_generation_prompt=generation)["input_ids"]
    assert model.encode_rendered(model.render(chat)) == ids
    assert ids.count(0) <= 2  # Llama 2 writes BOS once a turn; nobody adds another


@pytest.mark.parametrize("template", [LLAMA_3, QWEN], ids=["llama3", "qwen"])
def test_tools_and_calls_render_as_transformers(template: str) -> None:
    chat = to_chat(CALLS, TOOLS)
    assert chats.messages(chat) == CALLS and chats.tools(chat) == TOOLS
    expected = reference(template).apply_chat_template(CALLS, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert assets(chat_template__jinja=template.encode()).render(chat) == expected


def test_template_args_reach_the_template() -> None:
    chat = to_chat(TALK)
    chat.template_args.update({"enable_thinking": False})
    expected = reference(QWEN).apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert assets(chat_template__jinja=QWEN.encode()).render(chat) == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, QWEN], ids=["chatml", "llama3", "qwen"])
@pytest.mark.parametrize("content", ["The answer is", "trailing  ", "a <|im_end|> b"])
def test_a_final_message_is_continued_as_transformers_does(template: str, content: str) -> None:
    talk = [*TALK, {"role": "assistant", "content": content}]
    expected = reference(template).apply_chat_template(talk, tokenize=False, continue_final_message=True)
    chat = to_chat(talk, continue_final_message=True)
    assert assets(chat_template__jinja=template.encode()).render(chat) == expected


def test_a_final_message_that_the_template_hides_is_not_continued() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}", {})
    with pytest.raises(TemplateFailure, match="continued"):
        template.render([{"role": "user", "content": "x"}], continue_final_message=True)
    with pytest.raises(TemplateFailure, match="continue_final_message"):
        template.render([{"role": "user", "content": ""}], continue_final_message=True)


def test_the_time_is_that_of_the_request() -> None:
    chat = to_chat([{"role": "user", "content": "x"}])
    assert "03 Feb 2021" in assets(chat_template__jinja=LLAMA_3.encode()).render(chat, datetime(2021, 2, 3))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_an_invalid_argument(template: str) -> None:
    model = assets(chat_template__jinja=template.encode())
    with pytest.raises(OctavoError, match="chat template refused") as caught:
        model.render(to_chat(TALK))
    assert caught.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("files", [{"chat_template__jinja": b"{% if %}"}, {"tokenizer_config__json": b"{}"}])
def test_a_model_without_a_usable_template_still_takes_text(files: dict[str, bytes]) -> None:
    model = assets(**files)
    assert model.encode_text("hello")
    with pytest.raises(OctavoError, match="template") as caught:
        model.render(to_chat(TALK))
    assert caught.value.reason is Reason.INVALID_ARGUMENT


def test_named_templates_are_chosen_by_tools() -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    model = assets(tokenizer_config__json=json.dumps({"chat_template": named}).encode())
    assert model.render(to_chat(TALK)) == "plain"
    assert model.render(to_chat(TALK, TOOLS)) == "with tools"


def test_the_keys_of_a_struct_have_one_order() -> None:
    keys = ["zeta", "required", "parameters", "alpha", "description", "name", "type"]
    for shuffled in (keys, keys[::-1], sorted(keys)):
        struct = struct_pb2.Struct()
        struct.update(dict.fromkeys(shuffled, 1))
        expected = ["type", "name", "description", "parameters", "required", "alpha", "zeta"]
        assert list(chats.plain(struct)) == expected


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_template_is_bounded(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, in a refusal or with a text of bounded length that can be encoded."""
    monkeypatch.setattr(template_limits, "_MAX_STEPS", 500_000)
    try:
        rendered = ChatTemplate(HOSTILE[number], {}).render(TALK)
    except TemplateFailure:
        return
    assert len(rendered.encode()) < 64 << 20


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ 9 ** 9999999 }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ lipsum(9) }}",
        "{{ '\\ud800' }}",
        "{% set ns = namespace(x='a') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}",
    ],
)
def test_what_would_take_for_ever_or_all_memory_is_refused(source: str) -> None:
    with pytest.raises(TemplateFailure):
        ChatTemplate(source, {}).render(TALK)


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}", "{% if x %}" * 500 + "{% endif %}" * 500]
)
def test_a_template_that_is_nested_too_deeply_is_no_template(source: str) -> None:
    with pytest.raises(TemplateFailure, match="compiled"):
        ChatTemplate(source, {})


@pytest.mark.parametrize("source", [CHATML, LLAMA_3, QWEN.replace("loop.index0 > 100", "false")])
def test_a_conversation_of_thousands_of_turns_is_within_the_bounds(source: str) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(5_000)]
    assert len(ChatTemplate(source, {"bos_token": "<s>"}).render(turns)) > 5_000_000


def test_numbers_that_json_cannot_hold_are_refused_by_name() -> None:
    for number in (float("nan"), float("inf")):
        chat = to_chat([{"role": "user", "content": "x"}])
        chat.template_args.fields["z"].CopyFrom(struct_pb2.Value(number_value=number))
        with pytest.raises(OctavoError) as caught:
            assets().render(chat)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
