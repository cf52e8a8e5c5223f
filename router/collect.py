"""Whole answers: the messages of a stream put together again, a piece at a time, and how large one may be.

An answer of half a million log-probabilities is 14 MB of messages, and each copy of it in one go takes the event loop 90 ms. So it
grows while its tokens come, and what is long at its end is done in pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from octavo.v1 import inference_pb2

from router.request import BYTES_A_LOGPROB, Request, bytes_a_token
from router.validate import fail
from service.errors import FieldViolation

MAX_WHOLE_BYTES = 16 << 20  # of one answer, about (router/request.py): what clients take as one message
_PIECE_BYTES = 64 << 10  # about a millisecond to copy
_LONG_FIELDS = ("logprobs", "prompt_logprobs")


def check_size(requests: Sequence[inference_pb2.GenerateRequest]) -> None:
    """Raises INVALID_ARGUMENT where the outputs of all these prompts, as long as they may become, are too large for one answer.

    Where nobody says how long that is, it shows while they come (router/hub.py).
    """
    params = requests[0].sampling
    n, each = params.n if params.HasField("n") else 1, bytes_a_token(params)
    most = sum(request.sampling.max_tokens for request in requests) * n * each
    if most <= MAX_WHOLE_BYTES:
        return
    held = f" and {1 + params.logprobs} log-probabilities for each" if params.HasField("logprobs") else ""
    outputs = f"{len(requests)} prompts with {n} outputs" if len(requests) > 1 else f"{n} outputs"
    field = "sampling.logprobs" if held else "sampling.max_tokens"
    why = f"{outputs} of up to {params.max_tokens} tokens{held} are about {most} bytes, and an answer in one piece has at most"
    fail([FieldViolation(field, f"{why} {MAX_WHOLE_BYTES}: ask for less, or stream it")])


class Collector:
    """Puts the outputs of one request into its answer. Owned by the event loop."""

    def __init__(self, request: Request, answer: inference_pb2.CompleteResponse) -> None:
        self._request = request
        self._outputs = [answer.outputs.add(index=sequence.output.index) for sequence in request.sequences]
        self._texts: list[list[str]] = [[] for _ in self._outputs]

    async def more(self) -> None:
        """Take what is there, if it is worth while."""
        if self._request.bytes_buffered >= _PIECE_BYTES:
            await self._take()

    async def finish(self) -> None:
        """Take the rest of a request that is done."""
        await self._take()
        for output, text in zip(self._outputs, self._texts, strict=True):
            output.text = "".join(text)

    async def _take(self) -> None:
        asked = self._request.spec.sampling.prompt_logprobs
        for first_ones in self._request.take_prompt_logprobs(_step(1 + asked)):
            self._outputs[0].prompt_logprobs.extend(first_ones)
            await asyncio.sleep(0)
        for message in self._request.take():
            if message.HasField("delta"):
                delta = message.delta
                self._texts[delta.index].append(delta.text)
                output = self._outputs[delta.index]
                output.token_ids.extend(delta.token_ids)
                for entries in _slices(delta.logprobs):  # more than one where the loop was late
                    output.logprobs.extend(entries)
                    if len(entries) < len(delta.logprobs):
                        await asyncio.sleep(0)
                continue
            finished = message.finished
            output = self._outputs[finished.index]
            output.finish_reason = finished.finish_reason
            if finished.HasField("stop_match"):
                output.stop_match.CopyFrom(finished.stop_match)
            output.usage.CopyFrom(finished.usage)
            output.timing.CopyFrom(finished.timing)


def size_of(answer: inference_pb2.CompleteResponse) -> int:
    """About its bytes. ByteSize would look at each of its parts."""
    return sum(
        4 * len(output.token_ids) + len(output.text) + sum(map(_size_of, (output.logprobs, output.prompt_logprobs)))
        for output in answer.outputs
    )


async def encoded(answer: inference_pb2.CompleteResponse) -> bytes:
    """An answer as its bytes, made in pieces between which others have their turn."""
    head = inference_pb2.CompleteResponse()
    for field, value in answer.ListFields():
        if field.name != "outputs":
            setattr(head, field.name, value)
    pieces = [head.SerializeToString()]
    tag = inference_pb2.CompleteResponse.DESCRIPTOR.fields_by_name["outputs"].number << 3 | 2  # length-delimited
    for output in answer.outputs:
        parts = []
        for part in _parts(output):
            parts.append(part.SerializeToString())
            await asyncio.sleep(0)
        pieces += [_varint(tag), _varint(sum(map(len, parts))), *parts]  # parts of a message in a row are the message
    return b"".join(pieces)


def _parts(output: inference_pb2.Output) -> Iterator[inference_pb2.Output]:
    small = inference_pb2.Output()
    for field, value in output.ListFields():
        if field.name not in _LONG_FIELDS:
            small.MergeFrom(inference_pb2.Output(**{field.name: value}))
    yield small
    for entries in _slices(output.logprobs):
        yield inference_pb2.Output(logprobs=entries)
    for entries in _slices(output.prompt_logprobs):
        yield inference_pb2.Output(prompt_logprobs=entries)


def _slices(entries: Sequence[inference_pb2.TokenLogprobs]) -> Iterator[Sequence[inference_pb2.TokenLogprobs]]:
    size = _step(_width(entries))
    return (entries[at : at + size] for at in range(0, len(entries), size))


def _width(entries: Sequence[inference_pb2.TokenLogprobs]) -> int:
    """Log-probabilities of each; the first token of a prompt has none."""
    return 1 + len(entries[-1].top) if entries else 1


def _step(width: int) -> int:
    return max(1, _PIECE_BYTES // (BYTES_A_LOGPROB * width))


def _size_of(entries: Sequence[inference_pb2.TokenLogprobs]) -> int:
    return len(entries) * _width(entries) * BYTES_A_LOGPROB


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
