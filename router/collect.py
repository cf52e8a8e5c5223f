"""The messages of a stream, put together again: what an answer in one piece holds."""

from __future__ import annotations

from octavo.v1 import inference_pb2

from router.request import Request


def collect(request: Request) -> list[inference_pb2.Output]:
    """The outputs of a request that is done, in the order of their index. Takes all that it has."""
    outputs = [inference_pb2.Output(index=sequence.output.index) for sequence in request.sequences]
    texts: list[list[str]] = [[] for _ in outputs]
    for message in request.take():
        if message.HasField("delta"):
            delta = message.delta
            texts[delta.index].append(delta.text)
            output = outputs[delta.index]
            output.token_ids.extend(delta.token_ids)
            output.logprobs.extend(delta.logprobs)
            output.prompt_logprobs.extend(delta.prompt_logprobs)
            continue
        finished = message.finished
        output = outputs[finished.index]
        output.finish_reason = finished.finish_reason
        if finished.HasField("stop_match"):
            output.stop_match.CopyFrom(finished.stop_match)
        output.usage.CopyFrom(finished.usage)
        output.timing.CopyFrom(finished.timing)
    for output, text in zip(outputs, texts, strict=True):
        output.text = "".join(text)
    return outputs
