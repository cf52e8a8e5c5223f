"""One generation as its client sees it: what was delivered, and how to go on after a break. No I/O.

The router promises that a resumed stream starts exactly after what the client holds; the session checks it. A delta that
leaves a gap or repeats text is never passed on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.client.errors import OctavoError, Reason
from octavo.client.retry import Attempts
from octavo.client.silence import Silence
from octavo.v1 import inference_pb2 as pb

Event = pb.Started | pb.Delta | pb.Finished


@dataclass(slots=True)
class _Output:
    token_ids: list[int] = field(default_factory=list)
    text_bytes: int = 0
    finished: bool = False


class GenerateSession:
    """Feed it every message and every break of the streams of one request; it says what to deliver and what to ask for."""

    def __init__(self, request: pb.GenerateRequest, attempts: Attempts) -> None:
        """Takes ownership of `request`."""
        self._request = request
        self._outputs: dict[int, _Output] = {}
        self._num_outputs = request.sampling.n if request.sampling.HasField("n") else 1
        self._num_finished = 0
        self._base_attempt = request.attempt
        self._greeted = False  # whether the present stream has said Started
        self.attempts = attempts
        self.silence = Silence(attempts.first_word) if attempts.has_alternative else None
        self.started: pb.Started | None = None
        request.heartbeats = self.silence is not None

    @property
    def complete(self) -> bool:
        """Whether every output has finished."""
        return self._num_finished >= self._num_outputs

    def next_request(self) -> pb.GenerateRequest:
        """The request for the next stream: the first, the same again, or a resume."""
        self._greeted = False
        self._request.attempt = self._base_attempt + self.attempts.count
        if self.started is not None:
            self._request.resume.CopyFrom(self._resume(self.started))
        return self._request

    def receive(self, response: pb.GenerateResponse) -> Event | None:
        """The event to deliver, or None where the caller has it already. Raises OctavoError (PROTOCOL_VIOLATION)."""
        kind = response.WhichOneof("event")
        if kind == "started":
            return self._on_started(response.started)
        if kind == "heartbeat":
            self._agree(response.heartbeat)
            return None
        if kind is None:
            return None  # a kind of event that is newer than this client
        if not self._greeted:
            raise _violation(f"{kind} before started")
        if kind == "delta":
            return self._on_delta(response.delta)
        return self._on_finished(response.finished)

    def broke(self, error: OctavoError | None, now: float) -> float:
        """The stream ended too early, with an error or without. Seconds to wait before the next one, or raises the error."""
        if error is None:
            error = OctavoError(Reason.LOST, "the router closed the stream before its end")
        resuming = self.started is not None
        if resuming and self.started is not None and not self.started.ticket:
            raise error
        # Before its Started a stream, also a resumed one, was only asked for and may be asked for again.
        may_repeat = error.resumable or (error.retryable and not self._greeted)
        return self.attempts.failed(error, now, may_repeat=may_repeat, resuming=resuming)

    def _agree(self, terms: pb.Heartbeat) -> None:
        if self.silence is not None:
            self.silence.agreed(terms)

    def _on_started(self, started: pb.Started) -> pb.Started | None:
        if self._greeted:
            raise _violation("a second started in one stream")
        self._greeted = True
        self._agree(started.heartbeat)
        if self.started is None:
            self.started = started
            return started
        if started.digest != self.started.digest:
            raise OctavoError(Reason.MODEL_CHANGED, "the stream was resumed with another model digest")
        if started.ticket:
            self.started.ticket = started.ticket
        return None

    def fell_silent(self) -> OctavoError:
        """What broke a stream whose silence is over."""
        return OctavoError(Reason.LOST, "the router has said nothing for too long")

    def _on_delta(self, delta: pb.Delta) -> pb.Delta:
        output = self._output(delta.index)
        first_byte = delta.text_bytes - len(delta.text.encode())
        if output.finished or first_byte != output.text_bytes:
            raise _violation(
                f"output {delta.index} goes on at byte {first_byte}, {output.text_bytes} bytes were delivered before"
            )
        output.token_ids.extend(delta.token_ids)
        output.text_bytes = delta.text_bytes
        self.attempts.progressed()
        return delta

    def _on_finished(self, finished: pb.Finished) -> pb.Finished | None:
        output = self._output(finished.index)
        if output.finished:
            return None
        output.finished = True
        self._num_finished += 1
        self.attempts.progressed()
        return finished

    def _output(self, index: int) -> _Output:
        if index >= self._num_outputs:
            raise _violation(f"output {index} of {self._num_outputs}")
        return self._outputs.setdefault(index, _Output())

    def _resume(self, started: pb.Started) -> pb.Resume:
        states = [
            pb.ResumeState(
                index=index, token_ids=output.token_ids, text_bytes=output.text_bytes, finished=output.finished
            )
            for index, output in sorted(self._outputs.items())
        ]
        return pb.Resume(ticket=started.ticket, outputs=states, seed=started.seed)


class Collector:
    """Gathers the events of a stream into the answer that Complete would have given."""

    def __init__(self) -> None:
        self._texts: dict[int, list[str]] = {}
        self._outputs: dict[int, pb.Output] = {}
        self._response = pb.CompleteResponse()

    def add(self, event: Event) -> None:
        """Take the next event."""
        if isinstance(event, pb.Started):
            self._response.request_id = event.request_id
            self._response.model = event.model
            self._response.digest = event.digest
            self._response.seed = event.seed
            return
        output = self._outputs.setdefault(event.index, pb.Output(index=event.index))
        if isinstance(event, pb.Delta):
            self._texts.setdefault(event.index, []).append(event.text)
            output.token_ids.extend(event.token_ids)
            output.logprobs.extend(event.logprobs)
            output.prompt_logprobs.extend(event.prompt_logprobs)
            return
        output.finish_reason = event.finish_reason
        output.usage.CopyFrom(event.usage)
        output.timing.CopyFrom(event.timing)
        if event.HasField("stop_match"):
            output.stop_match.CopyFrom(event.stop_match)

    def response(self) -> pb.CompleteResponse:
        """What was gathered, outputs in the order of their index."""
        del self._response.outputs[:]
        for index, output in sorted(self._outputs.items()):
            output.text = "".join(self._texts.get(index, ()))
            self._response.outputs.append(output)
        return self._response


def _violation(text: str) -> OctavoError:
    return OctavoError(Reason.PROTOCOL_VIOLATION, f"the router broke the protocol: {text}")
