"""The files of the mock model: a tokenizer whose every id has a text, and a plain chat template. Made in code, no download."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from worker.backends.mock import EOS_TOKEN_ID

BOS_TOKEN_ID = 256

_TEMPLATE = (
    "{% if tools %}tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}{{ '\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}"  # in the form of Hermes and Qwen
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}{{ call.function.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def mock_assets(vocab_size: int, max_model_len: int) -> dict[str, bytes]:
    """File name to content, as a model directory would hold them. Same arguments, same bytes."""
    special = {"<bos>": BOS_TOKEN_ID, "<eos>": EOS_TOKEN_ID}
    vocab = {_byte_symbol(byte): byte for byte in range(256)}
    vocab |= special
    vocab |= {f"Ġw{token_id}": token_id for token_id in range(258, vocab_size)}
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text, i in special.items()
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    config = {
        "architectures": ["MockForCausalLM"],
        "model_type": "mock",
        "vocab_size": vocab_size,
        "max_position_embeddings": max_model_len,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
    }
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": _TEMPLATE},
    }
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}


def _byte_symbol(byte: int) -> str:
    """GPT-2's printable stand-in for a byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(1 for other in range(byte) if other not in printable))
