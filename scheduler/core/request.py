"""A request as the scheduler knows it: ids, limits and where it stands. Touched on admission, finish and preemption only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from scheduler.core.errors import InvalidField

if TYPE_CHECKING:
    from scheduler.core.prefix import HashChain

Int32Array = npt.NDArray[np.int32]

RequestKey = tuple[int, int]
"""(router_id, handle)."""


class FinishReason(IntEnum):
    """Why a sequence ended; the numbers of `octavo.v1.FinishReason`."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4


class RequestState(IntEnum):
    """Where a request is. `PARKED`: out of its row, but plans in flight still name it, or its grammar is not compiled yet."""

    WAITING = 0
    PARKED = 1
    RUNNING = 2
    FINISHED = 3


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The part of the sampling parameters that the scheduler acts on; the rest travels in `Request.payload`."""

    max_tokens: int
    """Output tokens at most, those of an earlier life included."""
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Every id that ends the sequence: the model's EOS ids, unless ignore_eos, and the request's own."""
    prompt_logprobs: bool = False
    """The prompt must really be computed, so the prefix cache isn't read."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. `prompt_token_ids` and `output_token_ids` are int32 [P] and [M]; outputs are confirmed tokens only.

    While it runs, its row's columns are ahead of `output_token_ids`; they are copied back when it leaves the row.
    `payload` belongs to the shell (the Submit message) and is handed back untouched with the plan that admits it.
    Raises InvalidField.
    """

    router_id: int
    handle: int
    model: str
    prompt_token_ids: Int32Array
    sampling: SamplingParams
    output_token_ids: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    digest: bytes = b""
    """Model digest that it is pinned to; set by submit if it is empty."""
    tenant: str = ""
    cache_salt: bytes = b""
    adapter: str = ""
    under_grammar: bool = False
    """Only workers that decode under grammars can run it."""
    extra_bytes: int = 0
    """What the shell sends to its worker besides token ids, where that may be much: its grammar."""
    priority: int = 0
    """Higher goes first."""
    arrival: float = 0.0
    """Seconds on the caller's clock: now minus what it has waited elsewhere."""
    deadline: float | None = None
    accepted: bool = False
    """It was accepted before, here or elsewhere: it is not refused for a full queue. So is whatever has outputs."""
    payload: object = None

    # Owned by the scheduler.
    state: RequestState = RequestState.WAITING
    sequence: int = 0
    """Order of submission; breaks ties of arrival."""
    submitted: float = 0.0
    """When this scheduler got it, seconds."""
    limit: int = 0
    """Tokens at most, prompt included; 0 until a worker's max_model_len is known."""
    was_admitted: bool = False
    resumed: bool = False
    """Waits at the head of its class: it has outputs or was preempted."""
    suspicion: int = 0
    """The group with which it is tried again after a failure, apart from all others; 0: it is under no suspicion."""
    failures_alone: int = 0
    """Failures of steps that ran nothing else, since its last new token."""
    lost_on: set[int] = field(default_factory=set)
    """Incarnations of the workers that were lost while they ran nothing else, since its last new token."""
    num_outputs_at_failure: int = -1
    lost_at: float | None = None
    """When its worker was lost or its step failed, seconds, until it is planned again."""
    was_late: bool = False
    """It left its row for want of a mask and has got none since: its next admission is no news."""
    num_late: int = 0
    """Times in a row that its grammar was not compiled in time, without a new token in between."""
    num_outputs_when_late: int = -1
    num_charged_outputs: int = 0
    """Outputs that its tenant was charged for, up to when it last left a row."""
    hash_chains: dict[bytes, HashChain] = field(default_factory=dict)
    """By seed: the hashes of its leading full blocks, as far as they were needed."""

    def __post_init__(self) -> None:
        self.prompt_token_ids = _token_ids("prompt_token_ids", self.prompt_token_ids)
        self.output_token_ids = _token_ids("output_token_ids", self.output_token_ids)
        if self.prompt_token_ids.size == 0:
            raise InvalidField("prompt_token_ids", "must not be empty")
        if self.sampling.max_tokens <= self.output_token_ids.size:
            raise InvalidField("max_tokens", f"must be more than the {self.output_token_ids.size} output tokens")
        if not 0 <= self.sampling.min_tokens <= self.sampling.max_tokens:
            raise InvalidField("min_tokens", "must be in [0, max_tokens]")
        if any(not 0 <= token < 2**31 for token in self.sampling.stop_token_ids):
            raise InvalidField("stop_token_ids", "ids must be in [0, 2^31)")
        if not 0 <= self.suspicion < 2**63:
            raise InvalidField("suspicion", "must be in [0, 2^63)")
        if not 0 <= self.handle < 2**32:
            raise InvalidField("handle", "must be an unsigned 32-bit number")
        self.accepted = self.accepted or self.output_token_ids.size > 0
        self.num_charged_outputs = self.output_token_ids.size
        self.resumed = self.output_token_ids.size > 0

    @property
    def key(self) -> RequestKey:
        """(router_id, handle)."""
        return self.router_id, self.handle

    @property
    def is_waiting(self) -> bool:
        """In the queue, or to join it when the plans that name it have come back."""
        return self.state in (RequestState.WAITING, RequestState.PARKED)

    @property
    def is_finished(self) -> bool:
        """Gone from the scheduler, whatever the reason."""
        return self.state is RequestState.FINISHED

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.prompt_token_ids.size

    @property
    def queue_size(self) -> int:
        """What it counts for among those that wait: its known tokens, and as tokens what else is held for it."""
        return self.num_known_tokens + self.extra_bytes // 4

    @property
    def num_known_tokens(self) -> int:
        """Prompt and confirmed output tokens."""
        return self.prompt_token_ids.size + self.output_token_ids.size

    def known_token_ids(self) -> Int32Array:
        """int32 [num_known_tokens]; a view of the prompt if there are no outputs."""
        if self.output_token_ids.size == 0:
            return self.prompt_token_ids
        return np.concatenate((self.prompt_token_ids, self.output_token_ids))

    @property
    def reads_prefix_cache(self) -> bool:
        """Prompt log-probabilities need every prompt token computed, until the first output has gone out."""
        return not self.sampling.prompt_logprobs or self.output_token_ids.size > 0


def _token_ids(name: str, values: npt.ArrayLike) -> Int32Array:
    ids = np.ascontiguousarray(values, dtype=np.int32)
    if ids.ndim != 1:
        raise InvalidField(name, "must be one-dimensional")
    if ids.size and int(ids.min()) < 0:
        raise InvalidField(name, "ids must not be negative")
    return ids
