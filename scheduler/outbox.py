"""What waits to be sent on one stream. The step loop only appends; the stream's writer takes.

Token columns that wait are merged: a router that reads slowly gets fewer, larger batches instead of a longer queue. Beyond a
bound the stream is cut; its router attaches again and resubmits what it still wants.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from octavo.v1 import common_pb2, scheduler_pb2

from scheduler.core.plan import TokenColumns
from service.columns import pack, unpack
from service.logprobs import Logprobs

M = TypeVar("M")

_MAX_MERGED = 4_096  # token entries, after which a message is closed: some 10 ms of a router's time


class Overflow(Exception):
    """The peer does not read: cut its stream."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token entries of one step for one router, with the log-probabilities that belong to them (owner: index of entry)."""

    columns: TokenColumns
    logprobs: common_pb2.LogprobColumns | None


class Outbox(Generic[M]):
    """A bounded FIFO of messages for one stream."""

    def __init__(self, max_messages: int) -> None:
        self._messages: deque[M] = deque()
        self._max_messages = max_messages

    def put(self, message: M) -> None:
        """Append. Raises Overflow."""
        if len(self._messages) >= self._max_messages:
            raise Overflow(f"{self._max_messages} messages wait to be sent")
        self._messages.append(message)

    def take(self) -> M | None:
        """The next message, or None."""
        return self._messages.popleft() if self._messages else None


class RouterOutbox:
    """The FIFO of one router: messages and token columns in the order in which they happened."""

    def __init__(self, max_messages: int, max_tokens: int) -> None:
        self._items: deque[scheduler_pb2.AttachResponse | Tokens] = deque()
        self._max_messages = max_messages
        self._max_tokens = max_tokens
        self._tokens = 0

    def put(self, message: scheduler_pb2.AttachResponse) -> None:
        """Append a message. Raises Overflow."""
        self._check()
        self._items.append(message)

    def put_tokens(self, tokens: Tokens) -> None:
        """Append a step's entries. Raises Overflow."""
        self._check()
        self._tokens += tokens.columns.handles.size
        self._items.append(tokens)

    def take(self, epoch: int) -> scheduler_pb2.AttachResponse | None:
        """The next message, the token entries that wait in a row merged into one, up to a size that is read in a moment; or None."""
        if not self._items:
            return None
        first = self._items.popleft()
        if not isinstance(first, Tokens):
            return first
        batch, size = [first], first.columns.handles.size
        while self._items and size < _MAX_MERGED:
            following = self._items[0]
            if not isinstance(following, Tokens):
                break
            self._items.popleft()
            batch.append(following)
            size += following.columns.handles.size
        self._tokens -= size
        return scheduler_pb2.AttachResponse(epoch=epoch, tokens=encode_tokens(batch))

    def _check(self) -> None:
        if len(self._items) >= self._max_messages or self._tokens >= self._max_tokens:
            raise Overflow(f"{len(self._items)} messages with {self._tokens} token entries wait to be sent")


def encode_tokens(batch: list[Tokens]) -> scheduler_pb2.TokenBatch:
    """One TokenBatch of the entries of several steps, in their order."""
    columns = [tokens.columns for tokens in batch]
    message = scheduler_pb2.TokenBatch(
        handles=pack(_join([c.handles for c in columns]), np.uint32),
        first_output_index=pack(_join([c.first_output_index for c in columns]), np.int32),
        num_tokens=pack(_join([c.num_tokens for c in columns]), np.int32),
        finish_reason=pack(_join([c.finish_reason for c in columns]), np.uint8),
        token_ids=pack(_join([c.token_ids for c in columns]), np.int32),
    )
    entries = 0
    for tokens in batch:
        if tokens.logprobs is not None:
            _append_logprobs(message.logprobs, tokens.logprobs, entries)
        entries += tokens.columns.handles.size
    return message


def select_logprobs(logprobs: Logprobs, columns: TokenColumns) -> common_pb2.LogprobColumns | None:
    """Those of a step's log-probabilities that belong to these entries; owner becomes the index of the entry."""
    entry_of = {plan_index: entry for entry, plan_index in enumerate(columns.plan_index.tolist())}
    new_owner = np.array([entry_of.get(index, -1) for index in logprobs.owner.tolist()], np.int32)
    kept = new_owner >= 0
    if not kept.any():
        return None
    kept_entries = np.repeat(kept, logprobs.num_entries)
    return common_pb2.LogprobColumns(
        owner=pack(new_owner[kept], np.int32),
        position=pack(logprobs.position[kept], np.int32),
        rank=pack(logprobs.rank[kept], np.int32),
        num_entries=pack(logprobs.num_entries[kept], np.int32),
        token_ids=pack(logprobs.token_ids[kept_entries], np.int32),
        logprobs=pack(logprobs.logprobs[kept_entries], np.float32),
    )


def _append_logprobs(into: common_pb2.LogprobColumns, more: common_pb2.LogprobColumns, offset: int) -> None:
    owner = unpack("logprobs.owner", more.owner, np.int32) + offset
    into.owner += pack(owner, np.int32)
    into.position += more.position
    into.rank += more.rank
    into.num_entries += more.num_entries
    into.token_ids += more.token_ids
    into.logprobs += more.logprobs


def _join(arrays: list[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
