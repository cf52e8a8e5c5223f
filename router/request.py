"""A request as the router runs it: n sequences, what is known of them, and the messages that its client still has to get."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from octavo.v1 import common_pb2, inference_pb2, scheduler_pb2

from router.detokenize import TokenTable
from router.logprobs import PositionLogprobs, to_message
from router.output import Output
from router.shared_grammar import SharedGrammar
from service.columns import pack
from service.errors import OctavoError

BYTES_A_LOGPROB = 32  # in an answer, about
_BYTES_A_TOKEN = 8  # likewise: id and text


def bytes_a_token(sampling: common_pb2.SamplingSpec | inference_pb2.SamplingParams) -> int:
    """About what a token takes in an answer: its id and text, and of each log-probability id, value, text and bytes."""
    return _BYTES_A_TOKEN + (BYTES_A_LOGPROB * (1 + sampling.logprobs) if sampling.HasField("logprobs") else 0)


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What never changes in the life of a request.

    `prompt_column` is int32 [num_prompt_tokens]; times are seconds on the caller's clock.
    """

    request_id: str
    tenant: str
    model: str
    digest: bytes
    seed: int
    group_id: int
    priority: int
    cache_salt: bytes
    prompt_column: bytes
    num_prompt_tokens: int
    sampling: common_pb2.SamplingSpec
    arrival: float
    deadline: float | None
    # Was accepted by another router before: never refused for want of room.
    resumed: bool = False
    # Bytes of the client's message: what is known of a request's size before anything is computed for it.
    message_size: int = 0
    grammar: SharedGrammar | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One output and where it runs. `link` and `handle` belong to the session; -1 is no handle."""

    request: Request
    output: Output
    seed: int
    link: str = ""
    handle: int = -1
    attempt: int = 0
    # Workers lost under it, without a new submission.
    migrations: int = 0
    # What the scheduler thinks of its part in that, until the next new token: the next scheduler is told.
    suspect_group: int = 0
    failures_alone: int = 0
    # Submissions since the last new token: bounds a request that never gets on.
    tries: int = 0
    not_before: float = 0.0
    homeless_since: float = 0.0
    admitted: bool = False
    # For the watch on stalls: when anything last came for it; whether it has a row now, as far as we were told, and whether it has
    # given a token since it had none; stalls since the last new token.
    progress_at: float = 0.0
    planned: bool = False
    computed: bool = False
    stalls: int = 0
    # Schedulers that had no room or no worker for it.
    refused_by: set[str] = field(default_factory=set)
    done: bool = False
    finished_sent: bool = False
    logprobs: dict[int, inference_pb2.TokenLogprobs] = field(default_factory=dict)
    first_token_at: float | None = None
    finished_at: float | None = None
    queue_ms: float = 0.0
    cached_tokens: int = 0

    @property
    def accepted(self) -> bool:
        """Whether it has got anywhere: then it is carried on, not refused."""
        request = self.request
        return self.admitted or request.started_told or request.spec.resumed or len(self.output.token_ids) > 0

    def waits_again(self, now: float) -> None:
        """It has lost its row, and stands in its scheduler's queue."""
        self.planned = self.computed = False
        self.progress_at = now


class Request:
    """All sequences of one client request. Owned by the session until done; the shell takes messages from it."""

    def __init__(self, spec: RequestSpec, outputs: list[Output], seeds: list[int], table: TokenTable) -> None:
        self.spec = spec
        self.sequences = [Sequence(self, output, seed) for output, seed in zip(outputs, seeds, strict=True)]
        self.error: OctavoError | None = None
        self.started_told = False  # the client knows that it was accepted
        self.prompt_logprobs: dict[int, inference_pb2.TokenLogprobs] = {}
        self._table = table
        self._with_logprobs = spec.sampling.HasField("logprobs")
        self._prompt_logprobs_sent = not spec.sampling.HasField("prompt_logprobs")

    @property
    def done(self) -> bool:
        """Nothing more will come from below; messages may still wait in `take`."""
        return self.error is not None or all(sequence.done for sequence in self.sequences)

    @property
    def delivered(self) -> bool:
        """Every output's end has been taken."""
        return all(sequence.finished_sent for sequence in self.sequences)

    @property
    def admitted(self) -> bool:
        """Whether some sequence has been planned."""
        return any(sequence.admitted or sequence.done for sequence in self.sequences)

    @property
    def placed(self) -> bool:
        """Whether a scheduler has got it, or had before."""
        return any(sequence.tries or sequence.accepted for sequence in self.sequences)

    @property
    def num_buffered(self) -> int:
        """Tokens that the client has not taken yet."""
        buffered = 0
        for sequence in self.sequences:
            buffered += sequence.output.num_buffered
        return buffered

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all outputs so far."""
        return sum(len(sequence.output.token_ids) for sequence in self.sequences)

    @property
    def bytes_buffered(self) -> int:
        """About what the client's tokens that it has not taken yet are in an answer."""
        return self.num_buffered * bytes_a_token(self.spec.sampling)

    @property
    def bytes_so_far(self) -> int:
        """About what an answer with all outputs so far is, and with the prompt's log-probabilities."""
        spec, sampling = self.spec, self.spec.sampling
        asked = sampling.HasField("prompt_logprobs")
        prompt = spec.num_prompt_tokens * (1 + sampling.prompt_logprobs) if asked else 0
        return self.num_output_tokens * bytes_a_token(sampling) + prompt * BYTES_A_LOGPROB

    def note_logprobs(self, sequence: Sequence, positions: list[PositionLogprobs]) -> None:
        """Keep the log-probabilities of prompt tokens and of output tokens that were not delivered yet."""
        for one in positions:
            index = one.position - self.spec.num_prompt_tokens
            if index >= 0:
                sequence.logprobs[index] = to_message(one, self._table)
            elif sequence.output.index > 0 or self._prompt_logprobs_sent or one.position in self.prompt_logprobs:
                continue  # a worker that begins anew tells them again
            else:  # as they come, chunk by chunk: all at once would hold up the loop
                self.prompt_logprobs[one.position] = to_message(one, self._table)

    def take(self) -> list[inference_pb2.GenerateResponse]:
        """Deltas and ends that can leave now, in order; each is handed out once."""
        messages = []
        for sequence in self.sequences:
            output = sequence.output
            message = output.take(sequence.logprobs if self._with_logprobs else None)
            if message is not None:
                if output.index == 0 and not self._prompt_logprobs_sent:
                    self._add_prompt_logprobs(message.delta)
                messages.append(message)
            if sequence.done and not sequence.finished_sent and self.error is None:
                sequence.finished_sent = True
                messages.append(inference_pb2.GenerateResponse(finished=self._finished(sequence)))
        return messages

    def take_prompt_logprobs(self, size: int) -> Iterator[list[inference_pb2.TokenLogprobs]]:
        """Those of the prompt, `size` positions at a time: then no delta has them. None before the first token is there."""
        if not self._prompt_logprobs_sent and self.sequences[0].output.num_buffered:
            self._prompt_logprobs_sent = True
            for at in range(0, self.spec.num_prompt_tokens, size):
                yield self._pop_prompt_logprobs(at, min(at + size, self.spec.num_prompt_tokens))

    def submission(self, sequence: Sequence, now: float) -> scheduler_pb2.Submit:
        """The message that starts `sequence`, or goes on with it, at a scheduler."""
        spec = self.spec
        submit = scheduler_pb2.Submit(
            handle=sequence.handle,
            request_id=spec.request_id,
            task=scheduler_pb2.TASK_GENERATE,
            model=spec.model,
            digest=spec.digest,
            tenant=spec.tenant,
            cache_salt=spec.cache_salt,
            priority=spec.priority,
            group_id=spec.group_id,
            index=sequence.output.index,
            seed=sequence.seed,
            attempt=sequence.attempt,
            waited_ms=max(0, round((now - spec.arrival) * 1e3)),
            sampling=spec.sampling,
            grammar=None if spec.grammar is None else spec.grammar.message,
            prompt=[scheduler_pb2.Segment(token_ids=spec.prompt_column)],
            output_token_ids=pack(sequence.output.token_ids, np.int32),
            num_prompt_tokens=spec.num_prompt_tokens,
            suspect_group=sequence.suspect_group,
            failures_alone=sequence.failures_alone,
            accepted=sequence.accepted,
        )
        if spec.deadline is not None:
            submit.remaining_ms = max(0, round((spec.deadline - now) * 1e3))
        if sequence.output.index > 0 or len(sequence.output.token_ids) > 0:
            submit.sampling.ClearField("prompt_logprobs")
        return submit

    def _add_prompt_logprobs(self, delta: inference_pb2.Delta) -> None:
        self._prompt_logprobs_sent = True
        delta.prompt_logprobs.extend(self._pop_prompt_logprobs(0, self.spec.num_prompt_tokens))

    def _pop_prompt_logprobs(self, begin: int, end: int) -> list[inference_pb2.TokenLogprobs]:
        """The first token has none."""
        known, none = self.prompt_logprobs, inference_pb2.TokenLogprobs()
        if begin == 0:
            known.pop(0, None)
        return [known.pop(position, none) for position in range(begin, end)]

    def _finished(self, sequence: Sequence) -> inference_pb2.Finished:
        output, arrival = sequence.output, self.spec.arrival
        first, end = sequence.first_token_at, sequence.finished_at
        return inference_pb2.Finished(
            index=output.index,
            finish_reason=output.finish_reason,  # type: ignore[arg-type]
            stop_match=output.stop_match,
            usage=inference_pb2.Usage(
                prompt_tokens=self.spec.num_prompt_tokens,
                completion_tokens=len(output.token_ids),
                cached_tokens=sequence.cached_tokens,
            ),
            timing=inference_pb2.Timing(
                queue_ms=sequence.queue_ms,
                ttft_ms=0.0 if first is None else (first - arrival) * 1e3,
                total_ms=0.0 if end is None else (end - arrival) * 1e3,
                migrations=sequence.attempt + sequence.migrations,
            ),
        )
