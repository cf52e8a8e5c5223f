"""The text side of a model, from files that lie: tokenizer.json, tokenizer_config.json, generation_config.json, chat template."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from random import Random
from typing import Any
from unittest import mock

from octavo.v1 import inference_pb2

from router import template_limits
from router.assets import AssetError, ModelAssets
from router.resolve import ModelLimits, resolve
from service.errors import OctavoError
from service.sampling import check_sampling
from tests.fuzz import documents, values
from tests.fuzz.harness import EPISODE, Target, Verdict
from tests.fuzz.peers import MAX_MODEL_LEN, VOCAB
from tests.fuzz.templates import TEMPLATES, mutated_template
from tests.unit.router_fakes import byte_fallback_tokenizer, byte_level_tokenizer
from worker.backends.mock_assets import mock_assets

_TEXTS = ("", "hello world", "naïve 你好 😀 <s> </s>", "<|im_start|>stop", "\x00\n\t  ▁Ġ", "a" * 500)
_WORDS: tuple[Any, ...] = (
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": "é", "start": 3, "stop": 1},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}, {"type": "Replace", "pattern": {"String": ""},
    "content": "xx"},
    {"type": "NFC"}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Lowercase"},
    {"type": "Prepend", "prepend": ""},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}, {"type": "WordPiece", "prefix": "##"},
    {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated", "invert": False},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [], "special_tokens": {}},
    {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9},
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}, {"type": "WordLevel", "vocab": {"a": 0},
    "unk_token": "b"},
    {"type": "Sequence", "decoders": []}, "<s>", "</s>", 330, 4294967295,
)  # fmt: skip


@functools.cache
def _tokenizers() -> tuple[dict[str, Any], ...]:
    kinds = (byte_level_tokenizer().to_str(), byte_fallback_tokenizer().to_str())
    return (*map(json.loads, kinds), json.loads(mock_assets(VOCAB, MAX_MODEL_LEN)["tokenizer.json"]))


def _valid(random: Random) -> dict[str, Any]:
    """Documents by file name; the template is a str."""
    eos = random.choice(("</s>", {"content": "</s>", "lstrip": False}))
    return {
        "tokenizer.json": random.choice(_tokenizers()),
        "tokenizer_config.json": {
            "bos_token": "<s>", "eos_token": eos, "unk_token": None, "model_max_length": 100,
            "chat_template": random.choice((TEMPLATES[0], [{"name": "default", "template": TEMPLATES[1]},
            {"name": "tool_use", "template": TEMPLATES[2]}])),
        },
        "generation_config.json": {
            "eos_token_id": random.choice((2, [2, 5])), "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.0,
            "repetition_penalty": 1.1, "do_sample": True,
        },
        "config.json": {"eos_token_id": 2, "vocab_size": VOCAB},
        "chat_template.jinja": random.choice(TEMPLATES),
    }  # fmt: skip


def _attack(random: Random) -> Verdict:
    documents_of = _valid(random)
    names = list(documents_of)
    victim = random.choice(("tokenizer.json", "tokenizer.json", "chat_template.jinja", *names))
    if victim not in ("tokenizer_config.json", "chat_template.jinja"):  # compiling templates is what takes time
        documents_of["tokenizer_config.json"].pop("chat_template")
    files: dict[str, bytes] = {}
    mutated = True
    for name, document in documents_of.items():
        if name == "chat_template.jinja":
            if name == victim:
                files[name] = mutated_template(random, document).encode("utf-8", "surrogatepass")
            elif random.random() < 0.1:
                files[name] = document.encode()
        elif name == victim and random.random() < 0.9:
            files[name] = documents.mutated_json(random, document, _WORDS)
        elif name == victim:
            files[name], mutated = random.randbytes(random.randrange(100)), False
        else:
            files[name] = json.dumps(document).encode()
    try:
        assets = ModelAssets.load(files)
    except AssetError as error:
        assert str(error)
        return Verdict(mutated, False)
    return Verdict(mutated, _use(random, assets))


def _use(random: Random, assets: ModelAssets) -> bool:
    """All that a request does with them."""
    accepted = True
    ids: list[int] = []
    try:
        for text in _TEXTS:
            ids += assets.encode_text(text)
        assert assets.max_characters_a_token >= 0
        for skip in (True, False):
            assets.decode([*ids[:50], 0, 5, 10**6, 2**31 - 1], skip).encode()
        for token_id in (0, 5, 300, 10**6):
            assets.table.token_bytes(token_id)
        limits = ModelLimits(MAX_MODEL_LEN, VOCAB)
        params = inference_pb2.SamplingParams(bad_words=["bad", "x"], stop=["end"])
        # Every default is one that the rest of the cluster takes.
        check_sampling(resolve(params, assets, limits, 3).sampling, max(VOCAB, 2**31 - 1))
    except OctavoError:
        accepted = False
    for chat in _chats(random):
        try:
            assets.encode_rendered(assets.render(chat))
        except OctavoError as error:
            error.to_status().SerializeToString()
            accepted = False
    return accepted


def _chats(random: Random) -> Iterator[inference_pb2.Chat]:
    chat = inference_pb2.Chat()
    for role, text in (("system", "be"), ("user", "hello"), ("assistant", "hi"), ("user", values.text(random)[:200])):
        chat.messages.add(role=role).content.add(text=text)
    yield chat
    chat.tools.add().update({"type": "function", "function": {"name": "f", "parameters": {"a": 1}}})
    chat.messages[-1].role = "assistant"
    chat.continue_final_message = True
    yield chat


def _episode(random: Random) -> Iterator[Verdict]:
    # The same limits, met sooner: a template that runs to its end of steps would take a second each time.
    with mock.patch.object(template_limits, "_MAX_STEPS", 100_000):
        for _ in range(EPISODE):
            yield _attack(random)


TARGET = Target(
    "assets", _episode, ("router.assets", "router.detokenize", "router.template", "router.chat", "router.resolve")
)
