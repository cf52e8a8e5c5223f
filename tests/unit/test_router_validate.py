"""Bad requests are refused at once, with the field named; good ones get every default."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from octavo.v1 import common_pb2, inference_pb2

from router.assets import AssetError, ModelAssets
from router.resolve import ModelLimits, check_prompt, resolve
from router.ticket import Ticket, TicketOffice
from router.validate import check_request
from service.columns import unpack
from service.errors import OctavoError, Reason
from tests.unit.router_fakes import asset_files, assets, byte_fallback_tokenizer, byte_level_tokenizer

ASSETS = assets()
LIMITS = ModelLimits(max_model_len=100, vocab_size=340)
PARAMS = inference_pb2.SamplingParams


def refused(request: inference_pb2.GenerateRequest) -> list[str]:
    with pytest.raises(OctavoError) as caught:
        check_request(request)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    return [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": 2**31}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"repetition_penalty": 1e-7}, "repetition_penalty"),
        ({"repetition_penalty": 1e7}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["x" * 5_000]}, "stop[0]"),
        ({"stop": ["x"] * 1_000_000}, "stop"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"logit_bias": {5: math.nan}}, "logit_bias[5]"),
        ({"logit_bias": {5: 100.5}}, "logit_bias[5]"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
    ],
)
def test_a_bad_parameter_is_named(params: dict[str, Any], field: str) -> None:
    assert refused(inference_pb2.GenerateRequest(text="x", sampling=PARAMS(**params))) == [f"sampling.{field}"]


def test_all_violations_come_at_once() -> None:
    request = inference_pb2.GenerateRequest(priority=101, idempotency_key="k" * 257, sampling=PARAMS(top_p=2, n=99))
    assert refused(request) == ["input", "sampling.top_p", "sampling.n", "priority", "idempotency_key"]


def test_inputs_that_are_empty_or_odd() -> None:
    assert refused(inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds())) == ["token_ids.ids"]
    assert refused(inference_pb2.GenerateRequest(chat=inference_pb2.Chat())) == ["chat.messages"]
    message = inference_pb2.ChatMessage(role="robot", content=[inference_pb2.ContentPart()])
    chat = inference_pb2.Chat(messages=[message], continue_final_message=True, add_generation_prompt=True)
    fields = refused(inference_pb2.GenerateRequest(chat=chat))
    assert fields == ["chat.messages[0].role", "chat.messages[0].content[0]", "chat.continue_final_message"]
    twice = inference_pb2.Resume(outputs=[inference_pb2.ResumeState(index=0), inference_pb2.ResumeState(index=0)])
    assert refused(inference_pb2.GenerateRequest(text="x", resume_grace_ms=300_001)) == ["resume_grace_ms"]
    fields = refused(inference_pb2.GenerateRequest(text="x", resume=twice))
    assert fields == ["resume.ticket", "resume.outputs", "resume.outputs[1].index"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"adapter": "lora"}, "adapter"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(more: dict[str, Any], field: str) -> None:
    with pytest.raises(OctavoError, match=field) as caught:
        check_request(inference_pb2.GenerateRequest(text="x", **more))
    assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize(
    ("grammar", "field"),
    [
        (common_pb2.Grammar(), "grammar"),
        (common_pb2.Grammar(regex=""), "grammar.regex"),
        (common_pb2.Grammar(lark="x" * 300_000), "grammar.lark"),
        (common_pb2.Grammar(choice=common_pb2.Choices()), "grammar.choice.values"),
        (common_pb2.Grammar(choice=common_pb2.Choices(values=["a", ""])), "grammar.choice.values[1]"),
        (common_pb2.Grammar(choice=common_pb2.Choices(values=["a"] * 5_000)), "grammar.choice.values"),
    ],
)
def test_grammars_of_a_wrong_size(grammar: common_pb2.Grammar, field: str) -> None:
    assert refused(inference_pb2.GenerateRequest(text="x", grammar=grammar)) == [field]


def resolved(params: PARAMS, model: ModelAssets = ASSETS, num_prompt_tokens: int = 10) -> common_pb2.SamplingSpec:
    return resolve(params, model, LIMITS, num_prompt_tokens).sampling


def test_defaults_of_the_contracts() -> None:
    spec = resolved(PARAMS())
    assert (spec.temperature, spec.top_p, spec.top_k, spec.min_p, spec.repetition_penalty) == (1.0, 1.0, 0, 0.0, 1.0)
    assert spec.max_tokens == 90 and not spec.HasField("logprobs")
    assert unpack("x", spec.stop_token_ids, np.int32).tolist() == [1]


def test_the_least_temperature_and_the_bounds_of_the_repetition_penalty() -> None:
    spec = resolved(PARAMS(temperature=1e-6, repetition_penalty=1e-6))
    assert spec.temperature == np.float32(1e-6) and spec.repetition_penalty == np.float32(1e-6)
    assert resolved(PARAMS(repetition_penalty=1e6)).repetition_penalty == 1e6
    assert resolved(PARAMS(temperature=9e-7)).temperature == 0
    assert resolved(PARAMS(temperature=1e-45)).temperature == 0


def test_defaults_of_the_model_and_values_of_the_request() -> None:
    config = {"eos_token_id": [1, 3], "temperature": 0.25, "top_p": "high", "top_k": 20, "repetition_penalty": -1}
    model = assets(generation_config__json=json.dumps(config).encode())
    spec = resolved(PARAMS(top_k=0, stop_token_ids=[7, 3]), model)
    assert (spec.temperature, spec.top_p, spec.top_k, spec.repetition_penalty) == (0.25, 1.0, 0, 1.0)
    assert unpack("x", spec.stop_token_ids, np.int32).tolist() == [1, 3, 7]
    ignoring = resolved(PARAMS(ignore_eos=True, stop_token_ids=[7]), model)
    assert unpack("x", ignoring.stop_token_ids, np.int32).tolist() == [7]


def test_bad_words_are_banned_with_and_without_a_space() -> None:
    tokenizer = byte_level_tokenizer()
    spec = resolved(PARAMS(bad_words=["hello"]))
    banned = [unpack("x", sequence.token_ids, np.int32).tolist() for sequence in spec.bad_words]
    assert banned == [tokenizer.encode(text, add_special_tokens=False).ids for text in ("hello", " hello")]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"stop_token_ids": [340]}, "stop_token_ids[0]"),
        ({"allowed_token_ids": [1, 400]}, "allowed_token_ids[1]"),
        ({"allowed_token_ids": [1] * 341}, "allowed_token_ids"),
        ({"logit_bias": {340: 1.0}}, "logit_bias[340]"),
        ({"min_tokens": 91}, "min_tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_named(params: dict[str, Any], field: str) -> None:
    with pytest.raises(OctavoError) as caught:
        resolved(PARAMS(**params))
    assert [v.field for v in caught.value.violations] == [f"sampling.{field}"]


def test_log_probabilities_of_a_prompt_have_a_bound() -> None:
    limits = ModelLimits(max_model_len=200_000, vocab_size=340)
    for count, best in ((131_072, 0), (6_241, 20)):
        params = PARAMS(prompt_logprobs=best, max_tokens=1)
        assert resolve(params, ASSETS, limits, count).sampling.prompt_logprobs == best
        with pytest.raises(OctavoError) as caught:
            resolve(params, ASSETS, limits, count + 1)
        assert [v.field for v in caught.value.violations] == ["sampling.prompt_logprobs"]
        assert caught.value.reason is Reason.INVALID_ARGUMENT
    resolve(PARAMS(logprobs=20, max_tokens=1), ASSETS, limits, 150_000)


def test_lengths() -> None:
    assert resolved(PARAMS(max_tokens=90)).max_tokens == 90
    for params, count in ((PARAMS(max_tokens=91), 10), (PARAMS(), 100)):
        with pytest.raises(OctavoError) as caught:
            check_prompt([1] * count, LIMITS, given=False)
            resolved(params)
        assert caught.value.reason is Reason.PROMPT_TOO_LONG
    with pytest.raises(OctavoError, match=r"token_ids.ids\[1\]"):
        check_prompt([1, 340, 2], LIMITS, given=True)
    with pytest.raises(OctavoError, match="no tokens"):
        check_prompt([], LIMITS, given=False)


def test_special_tokens_in_text_are_plain_text() -> None:
    ids = ASSETS.encode_text("<|im_end|>")
    assert ids[0] == 0 and len(ids) > 2  # BOS, then ordinary pieces
    assert ASSETS.encode_rendered("<|im_end|>") == [3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer.json is missing"),
        ({"tokenizer.json": b"{"}, "tokenizer.json"),
        (asset_files(config__json=b"[1]"), "config.json: no JSON object"),
        (asset_files(generation_config__json=b"{"), "generation_config.json"),
    ],
)
def test_bad_asset_files_are_named(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(AssetError, match=message):
        ModelAssets.load(files)


_DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (asset_files(generation_config__json=_DEEP), "generation_config.json"),
        (asset_files(tokenizer__json=_DEEP), "tokenizer.json"),
        (asset_files(config__json=b'{"a":' * 100_000), "config.json"),
    ],
)
def test_nesting_without_end_is_a_bad_file(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(AssetError, match=message):
        ModelAssets.load(files)


def _tokenizer_with(**changes: Any) -> bytes:
    return json.dumps(json.loads(byte_level_tokenizer().to_str()) | changes).encode()


def test_an_id_beyond_reason_is_refused_before_anything_walks_up_to_it() -> None:
    model = json.loads(byte_level_tokenizer().to_str())["model"]
    data = _tokenizer_with(model=model | {"vocab": model["vocab"] | {"far": 2**32 - 1}})
    with pytest.raises(AssetError, match="4294967295"):
        ModelAssets.load(asset_files(tokenizer__json=data))


def test_a_panic_of_the_tokenizer_library_is_an_error_like_others() -> None:
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(AssetError, match=r"tokenizer\.json"):
        ModelAssets.load(asset_files(tokenizer__json=_tokenizer_with(normalizer=normalizer)))


def test_a_tokenizer_that_fails_on_a_text_refuses_the_request() -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[absent]"}
    model = assets(tokenizer__json=_tokenizer_with(model=words, added_tokens=[], post_processor=None))
    with pytest.raises(OctavoError) as caught:
        model.encode_text("b")
    assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize("templates", [[5, None, "name template"], [{"name": "default"}], {"default": "x"}])
def test_chat_templates_of_another_shape_are_none(templates: Any) -> None:
    config = json.dumps({"chat_template": templates}).encode()
    assert assets(tokenizer_config__json=config).template is None


def test_defaults_that_no_request_could_have_are_passed_over() -> None:
    config = b'{"temperature": 1' + b"0" * 400 + b', "top_k": 1e999, "min_p": NaN, "repetition_penalty": -Infinity}'
    spec = resolved(PARAMS(), assets(generation_config__json=config))
    assert (spec.temperature, spec.top_k, spec.min_p, spec.repetition_penalty) == (1.0, 0, 0.0, 1.0)
    assert resolved(PARAMS(), assets(generation_config__json=b'{"temperature": 1e300}')).temperature == 1.0


def test_an_unknown_decoder_is_refused_by_name() -> None:
    tokenizer = json.loads(byte_fallback_tokenizer().to_str())
    for decoder in (None, {"type": "WordPiece", "prefix": "##", "cleanup": True}):
        data = json.dumps(tokenizer | {"decoder": decoder}).encode()
        with pytest.raises(AssetError, match="decoder"):
            ModelAssets.load({"tokenizer.json": data})


def test_eos_falls_back_to_config_and_tokenizer() -> None:
    assert assets(generation_config__json=b"{}", config__json=b'{"eos_token_id": 5}').eos_token_ids == (5,)
    assert assets(generation_config__json=b"{}").eos_token_ids == (1,)


TICKET = Ticket("req-1", "acme", 1_750_000_000_123, 2**64 - 1, b"d" * 32, b"p" * 32)


def test_tickets_come_back() -> None:
    data = TicketOffice(b"secret").issue(TICKET)
    assert TicketOffice(b"secret").check(data, "acme") == TICKET


def test_forged_tickets_are_refused() -> None:
    office = TicketOffice(b"secret")
    data = office.issue(TICKET)
    forged = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data))]
    for attempt in [*forged, b"", data[:20], data[:-1], data + b"x", TicketOffice(b"other").issue(TICKET)]:
        with pytest.raises(OctavoError) as caught:
            office.check(attempt, "acme")
        assert caught.value.reason is Reason.TICKET_INVALID
    with pytest.raises(OctavoError, match="another tenant"):
        office.check(data, "umbrella")
