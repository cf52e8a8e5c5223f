"""Which worker a waiting request should go to: the longest cached prefix against load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.core.prefix import HashChain, chain_for, num_cached_blocks
from scheduler.core.request import Int32Array, Request
from scheduler.core.settings import WorkerSpec
from scheduler.core.state import SchedulerState, WorkerState


@dataclass(slots=True)
class Placement:
    """A worker with room for a request, and what the request would find there."""

    worker: WorkerState
    chain: HashChain
    num_hits: int
    """Leading blocks that need not be computed …"""
    hits: list[int]
    """… and the ids of those that are not behind a sliding window already."""
    score: float


def fits(spec: WorkerSpec, num_known: int, limit: int) -> bool:
    """Whether an idle worker of this spec could run a request to its limit. The last token is never computed."""
    return num_known < limit <= spec.max_model_len and spec.num_blocks_for(limit - 1) <= spec.num_blocks


def limit_on(spec: WorkerSpec, request: Request) -> int:
    """Tokens at most, prompt included. A request that came while no worker was there takes the limit of its first one."""
    return request.limit or min(request.num_prompt_tokens + request.sampling.max_tokens, spec.max_model_len)


def can_run(spec: WorkerSpec, request: Request) -> bool:
    """Whether an idle worker of this spec could run the request to its limit."""
    if request.under_grammar and not spec.grammars:
        return False
    return fits(spec, request.num_known_tokens, limit_on(spec, request))


def find_placement(state: SchedulerState, request: Request, only: WorkerState | None = None) -> Placement | None:
    """The best worker that has room for all known tokens of the request now, or None. `only`: that worker or none."""
    token_ids = request.known_token_ids()
    best: Placement | None = None
    for worker in state.workers_of.get(request.digest, ()) if only is None else (only,):
        place = place_on(state, worker, request, token_ids)
        if place is not None and (best is None or place.score > best.score):
            best = place
    return best


def place_on(state: SchedulerState, worker: WorkerState, request: Request, token_ids: Int32Array) -> Placement | None:
    """The place of the request on this worker, or None if it has no room now. `token_ids` are all its known tokens."""
    if worker.draining or worker.rows.num_free == 0:
        return None
    if not can_run(worker.spec, request):
        return None
    chain, num_hits = find_prefix(state, worker, request, token_ids)
    hits = blocks_to_read(worker, chain, num_hits)
    if not has_room(state, worker, request, hits):
        return None
    # A cached prefix is worth as much as the share of the request that it saves; load costs the share of rows that run.
    share_cached = num_hits * worker.spec.block_size / request.num_known_tokens
    return Placement(worker, chain, num_hits, hits, share_cached - worker.rows.num_running / worker.spec.max_rows)


def find_prefix(
    state: SchedulerState, worker: WorkerState, request: Request, token_ids: Int32Array
) -> tuple[HashChain, int]:
    """The request's hash chain on this worker, and how many of its leading blocks are cached there.

    At least one token is left to compute: the logits of the last known token are what the first sample needs.
    """
    chain = chain_for(worker.spec, request)
    if not state.settings.prefix_caching or not request.reads_prefix_cache:
        return chain, 0
    num_full = (request.num_known_tokens - 1) // worker.spec.block_size
    hashes = chain.extend(token_ids, num_full)
    return chain, num_cached_blocks(worker.spec, worker.pool, hashes[:num_full])


def blocks_to_read(worker: WorkerState, chain: HashChain, num_hits: int) -> list[int]:
    """Of the `num_hits` cached leading blocks those that are not behind the window of what comes after them."""
    first = worker.spec.first_live_block(num_hits * worker.spec.block_size)
    return [block for name in chain.hashes[first:num_hits] if (block := worker.pool.lookup(name)) is not None]


def has_room(state: SchedulerState, worker: WorkerState, request: Request, hits: list[int]) -> bool:
    """Whether blocks for all known tokens are available above the watermark. A worker that runs nothing needs no watermark."""
    spec, pool = worker.spec, worker.pool
    watermark = int(state.settings.watermark * spec.num_blocks) if worker.rows.num_running else 0
    # Hits that a row owns already cost nothing; hits that nobody owns are taken from what is available.
    needed = spec.num_blocks_for(request.num_known_tokens) - len(hits) + pool.num_unowned(hits)
    return needed + watermark <= pool.num_available


def next_block_is_coming(
    request: Request, chain: HashChain, num_hits: int, block_size: int, completes: Mapping[bytes, int]
) -> bool:
    """Whether the plan in the making, which fills the blocks in `completes`, computes the first block that the request lacks."""
    num_full = (request.num_known_tokens - 1) // block_size
    if not request.reads_prefix_cache or num_hits >= min(num_full, len(chain.hashes)):
        return False
    return chain.hashes[num_hits] in completes
