"""What an entry of a TokenBatch adds to its output: each token once, in its place. Sans I/O, a part of the session.

An entry says at which index of the output it begins. What lies below the output's length has come before and is dropped; an entry that
begins above it, or ends the output below it, was made for another past than ours and belongs nowhere.
"""

from __future__ import annotations

from router.batch import Entry
from router.logprobs import PositionLogprobs
from router.request import Sequence


def take(sequence: Sequence, entry: Entry, now: float) -> tuple[int, bool]:
    """Append what is new, and the end if there is one. `now` in seconds.

    Returns how many of its tokens were dropped, and whether it belongs there; the sequence has to be submitted again if not.
    """
    output, have = sequence.output, len(sequence.output.token_ids)
    sequence.planned, sequence.progress_at = True, now
    if entry.first_output_index > have:
        return 0, False
    fresh = entry.token_ids
    if entry.first_output_index < have:
        fresh = fresh[have - entry.first_output_index :]
    dropped = len(entry.token_ids) - len(fresh)
    if entry.logprobs:
        _note_logprobs(sequence, entry.logprobs, len(fresh))
    if fresh:
        if not sequence.computed:  # the first since it was submitted or migrated
            _note_first(sequence, now)
        output.append(fresh)
    if entry.finish_reason and not output.finish_reason:
        if entry.first_output_index + len(entry.token_ids) < have:
            return dropped, False
        output.end(entry.finish_reason)
    return dropped, True


def _note_first(sequence: Sequence, now: float) -> None:
    """It gets on: what it has been through is forgotten."""
    if sequence.first_token_at is None:
        sequence.first_token_at = now
    sequence.tries = sequence.stalls = 0
    sequence.refused_by.clear()
    sequence.computed = True
    sequence.suspect_group, sequence.failures_alone = 0, 0


def _note_logprobs(sequence: Sequence, positions: list[PositionLogprobs], num_fresh: int) -> None:
    """Keeps those of the prompt and of the tokens that came with them; nothing else can ever leave."""
    prompt = sequence.request.spec.num_prompt_tokens
    standing = prompt + len(sequence.output.token_ids)
    end = standing + num_fresh
    wanted = [one for one in positions if standing <= one.position < end or one.position < prompt]
    sequence.request.note_logprobs(sequence, wanted)
