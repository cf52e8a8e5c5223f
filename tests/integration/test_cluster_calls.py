"""Calls of tools through all services on the mock model, whose tokens are random: whatever comes out is calls with right arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import grpc
import jsonschema
import pytest
from octavo.v1 import common_pb2, inference_pb2
from octavo.v1.inference_pb2_grpc import InferenceServiceStub

from deploy.cluster import LocalCluster

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
CLOCK = {
    "type": "object",
    "properties": {"utc": {"type": "boolean"}},
    "required": ["utc"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": CITY, "clock": CLOCK}
STOP = common_pb2.FINISH_REASON_STOP


@pytest.fixture(scope="module")
def stub() -> Iterator[InferenceServiceStub]:
    lease = {"lease-ms": 5000}
    worker = {**lease, "max-model-len": 2048, "num-blocks": 600, "max-rows": 8, "mock-vocab-size": 700}
    flags = {"scheduler": lease, "router": lease, "worker": worker}
    with (
        LocalCluster(redis=False, flags=flags, timeout=120) as cluster,
        grpc.insecure_channel(cluster.routers[0]) as channel,
    ):
        yield InferenceServiceStub(channel)


def test_required_calls_come_out_right(stub: InferenceServiceStub) -> None:
    calls = common_pb2.ToolCalls(
        opening="<tool_call>\n", closing="\n</tool_call>", separator="\n", arguments="arguments", most=3
    )
    for name, schema in SCHEMAS.items():
        calls.functions.add(name=name, json_schema=json.dumps(schema))
    request = inference_pb2.GenerateRequest(
        text="x", sampling={"max_tokens": 1500, "seed": 3, "n": 4}, grammar=common_pb2.Grammar(calls=calls)
    )
    answer = stub.Complete(inference_pb2.CompleteRequest(request=request), timeout=120)
    assert len(answer.outputs) == 4
    for output in answer.outputs:
        assert output.finish_reason == STOP
        one = r"<tool_call>\n(.*?)\n</tool_call>"
        assert re.fullmatch(rf"(?s){one}(\n{one}){{0,2}}", output.text), output.text
        for text in re.findall(f"(?s){one}", output.text):
            call = json.loads(text)
            assert list(call) == ["name", "arguments"]
            jsonschema.validate(call["arguments"], SCHEMAS[call["name"]])


def test_a_conversation_that_requires_a_call_gets_one(stub: InferenceServiceStub) -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user")])
    chat.tools.add().update({"type": "function", "function": {"name": "clock", "parameters": CLOCK}})
    chat.tool_choice.mode = inference_pb2.ToolChoice.MODE_NAMED
    chat.tool_choice.name = "clock"
    request = inference_pb2.GenerateRequest(chat=chat, sampling={"max_tokens": 1500, "seed": 4})
    (output,) = stub.Complete(inference_pb2.CompleteRequest(request=request), timeout=60).outputs
    found = re.fullmatch(r"(?s)<tool_call>\n(.*)\n</tool_call>", output.text)
    assert found is not None and output.finish_reason == STOP
    call = json.loads(found[1])
    jsonschema.validate(call["arguments"], CLOCK)
    assert call["name"] == "clock"


def test_where_the_model_chooses_beside_a_form_it_is_calls_or_the_form(stub: InferenceServiceStub) -> None:
    """Random tokens take either way; both come out right."""
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user")])
    function = {"name": "clock", "parameters": CLOCK, "strict": True}
    chat.tools.add().update({"type": "function", "function": function})
    chat.tool_choice.mode = inference_pb2.ToolChoice.MODE_AUTO
    request = inference_pb2.GenerateRequest(
        chat=chat,
        sampling={"max_tokens": 500, "seed": 5, "n": 16},
        grammar=common_pb2.Grammar(json_schema=json.dumps(CITY)),
    )
    kinds = set()
    for output in stub.Complete(inference_pb2.CompleteRequest(request=request), timeout=120).outputs:
        if output.finish_reason != STOP:  # many calls
            continue
        is_call = output.text.startswith("<tool_call>")
        kinds.add(is_call)
        for text in re.findall(r"(?s)<tool_call>\n(.*?)\n</tool_call>", output.text):
            jsonschema.validate(json.loads(text)["arguments"], CLOCK)
        if not is_call:
            jsonschema.validate(json.loads(output.text), CITY)
    assert kinds == {True, False}
