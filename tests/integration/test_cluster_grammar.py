"""Grammars through all services on the mock model: what comes out satisfies them, whatever else a request asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from octavo.client import Client, OctavoError, Reason
from octavo.v1 import inference_pb2 as pb

from deploy.cluster import LocalCluster

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
STOP, LENGTH, ERROR = 1, 2, 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    # Long leases: the machine may be busy, and nothing here is about deaths.
    lease = {"lease-ms": 5000}
    worker = {**lease, "max-model-len": 1024, "num-blocks": 300, "max-rows": 8, "mock-vocab-size": 700}
    flags = {"scheduler": lease, "router": lease, "worker": worker}
    with LocalCluster(redis=False, flags=flags, timeout=120) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.routers[0]) as client:
        yield client


def outputs(client: Client, **options: Any) -> list[pb.Output]:
    return list(client.complete("x", **{"max_tokens": 900, "seed": 3, **options}).outputs)  # type: ignore[arg-type]


def test_json_schemas_hold(client: Client) -> None:
    found = outputs(client, json_schema=json.dumps(PERSON), n=4)
    for output in found:
        assert output.finish_reason == STOP
        jsonschema.validate(json.loads(output.text), PERSON)
    assert len({output.text for output in found}) > 1


def test_a_stream_gives_what_complete_gives(client: Client) -> None:
    options: dict[str, Any] = {"json_schema": json.dumps(PERSON), "max_tokens": 900, "seed": 3}
    whole = client.complete("x", **options).outputs[0]
    with client.generate("x", **options) as stream:
        assert "".join(stream.text()) == whole.text


@pytest.mark.parametrize("regex", [r"[ab]{3}c{1,4}", r"\d{4}-\d\d", "(yes|no)!"])
def test_regular_expressions_hold(client: Client, regex: str) -> None:
    (output,) = outputs(client, regex=regex)
    assert re.fullmatch(regex, output.text) and output.finish_reason == STOP


def test_choices_hold_to_the_letter(client: Client) -> None:
    choices = ['say "hi"', "back\\slash", "line\nend", "é😀", "a/b", "\t"]
    texts = {outputs(client, choice=choices, seed=seed)[0].text for seed in range(12)}
    assert texts <= set(choices) and len(texts) > 1


def test_lark_grammars_hold(client: Client) -> None:
    (output,) = outputs(client, lark='start: "x=" NUMBER ("," NUMBER)~1..3\nNUMBER: /[1-9][0-9]{0,3}/')
    assert re.fullmatch(r"x=[1-9]\d{0,3}(,[1-9]\d{0,3}){1,3}", output.text) and output.finish_reason == STOP


def test_any_json(client: Client) -> None:
    (output,) = outputs(client, json_schema="{}", seed=1)
    assert output.finish_reason == STOP
    json.loads(output.text)


def test_a_complete_output_ends_whatever_min_tokens_and_ignore_eos_say(client: Client) -> None:
    for more in ({"min_tokens": 50}, {"ignore_eos": True}, {"ignore_eos": True, "min_tokens": 50}):
        (output,) = outputs(client, choice=["yes", "no"], **more)
        assert (output.text, output.finish_reason) in (("yes", STOP), ("no", STOP))


def test_an_output_that_can_go_on_heeds_min_tokens_and_ignore_eos(client: Client) -> None:
    (output,) = outputs(client, regex="(ab)*", ignore_eos=True, max_tokens=40)
    assert (output.text, output.finish_reason) == ("ab" * 20, LENGTH)
    (output,) = outputs(client, regex="(ab)*", min_tokens=31)
    assert output.finish_reason == STOP and len(output.text) >= 32 and len(output.text) % 2 == 0


def test_max_tokens_and_stop_strings_cut_as_ever(client: Client) -> None:
    (output,) = outputs(client, json_schema=json.dumps(PERSON), max_tokens=3)
    assert output.finish_reason == LENGTH and len(output.token_ids) == 3
    (output,) = outputs(client, regex="a{3}b{3}", stop=["ab"])
    assert (output.text, output.finish_reason, output.stop_match.text) == ("aa", STOP, "ab")


@pytest.mark.parametrize(
    ("grammar", "field"),
    [
        ({"regex": "a(("}, "grammar.regex"),
        ({"lark": "start: missing"}, "grammar.lark"),
        ({"json_schema": "[1"}, "grammar.json_schema"),
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "grammar.json_schema"),
        (
            {"json_schema": '{"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}'},
            "grammar.json_schema",
        ),
        ({"json_schema": '{"$ref": "https://example.com/schema"}'}, "grammar.json_schema"),
        ({"json_schema": "false"}, "grammar.json_schema"),
        ({"json_schema": "[" * 100_000}, "grammar.json_schema"),
    ],
)
def test_what_can_not_be_compiled_is_refused_with_the_reason(client: Client, grammar: Any, field: str) -> None:
    with pytest.raises(OctavoError) as caught:
        outputs(client, **grammar)
    assert caught.value.reason is Reason.GRAMMAR_INVALID
    (violation,) = caught.value.violations
    assert violation.field == field and violation.description
