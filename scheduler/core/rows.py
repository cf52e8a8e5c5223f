"""The running requests of one worker as numpy columns, indexed by row.

What the counts of a row mean, left to right in its sequence of tokens:

    0 ......... num_initial ....... num_confirmed ......... num_tokens ....... limit
    | known when it got |  outputs that  | outputs promised by |  not sampled  |
    | its row           |  came back     | plans in flight     |  yet          |
                    num_computed ->  everything before it is computed once the plans in flight are done

num_computed moves when a plan is made, num_confirmed when its result comes. A row that catches up
(num_computed == num_tokens) samples, which promises one token more. The last token, at limit - 1, is sampled but
never computed.
"""

from __future__ import annotations

import bisect

import numpy as np

from scheduler.core.plan import Int64Array
from scheduler.core.prefix import HashChain
from scheduler.core.request import Int32Array, Request
from scheduler.core.settings import WorkerSpec

INITIAL_STOP_WIDTH = 2
NO_TOKEN = -1


def order_key(request: Request) -> tuple[int, float, int]:
    """Who is served first, and preempted last: highest priority, then earliest arrival. Unique."""
    return -request.priority, request.arrival, request.sequence


class Rows:
    """Columns of length max_rows. `tokens` and `block_table` are large but paged in by the system only as they are written."""

    def __init__(self, spec: WorkerSpec) -> None:
        size = spec.max_rows
        self.spec = spec
        self.num_tokens = np.zeros(size, np.int64)
        self.num_computed = np.zeros(size, np.int64)
        self.num_confirmed = np.zeros(size, np.int64)
        self.num_initial = np.zeros(size, np.int64)
        self.num_prompt = np.zeros(size, np.int64)
        self.num_charged = np.zeros(size, np.int64)  # tokens that the tenant's counter knows of
        self.account = np.zeros(size, np.int64)  # the same for rows of one tenant and priority, below max_rows
        self.limit = np.zeros(size, np.int64)
        self.last = np.zeros(size, np.int64)  # limit - 1: tokens that are computed at most
        self.min_total = np.zeros(size, np.int64)  # prompt + min_tokens
        self.num_blocks = np.zeros(size, np.int64)  # length of the block table …
        self.capacity = np.zeros(size, np.int64)  # … and the tokens that it holds
        self.next_full = np.zeros(size, np.int64)  # computed tokens at which the next block of sampled tokens is full
        self.first_block = np.zeros(size, np.int64)  # blocks before it are behind the window and not owned
        self.last_step = np.zeros(size, np.int64)  # the last plan that names this row
        self.handle = np.zeros(size, np.int64)
        self.router_id = np.zeros(size, np.int64)
        self.prompt_logprobs = np.zeros(size, np.bool_)
        self.version = 0  # grows whenever a row is occupied or freed
        # Grows whenever a row is freed, so that results for its former request are told apart.
        self.generation = np.zeros(size, np.int64)
        self.stop_token_ids = np.full((INITIAL_STOP_WIDTH, size), NO_TOKEN, np.int32)  # made longer as requests need it
        # int32 [row, block of the row, token of the block], and the same memory as [row, token]
        self.token_blocks = np.empty((size, spec.max_blocks_per_row, spec.block_size), np.int32)
        self.tokens = self.token_blocks.reshape(size, -1)
        self.block_table = np.empty((size, spec.max_blocks_per_row), np.int32)
        self.requests: list[Request | None] = [None] * size
        self.chains: list[HashChain | None] = [None] * size
        self.num_prompt_logprobs = 0
        self._accounts: dict[tuple[int, str], list[int]] = {}  # number and rows of each that has any
        self._free_accounts = list(range(size))
        self._free = list(range(size - 1, -1, -1))
        self._order_keys: list[tuple[int, float, int]] = []  # ascending; the request of _order[i] has key i
        self._order = np.empty(0, np.int64)

    @property
    def num_free(self) -> int:
        """Rows without a request."""
        return len(self._free)

    @property
    def num_running(self) -> int:
        """Rows with a request."""
        return len(self.requests) - len(self._free)

    def order(self) -> Int64Array:
        """Running rows in the order in which they are served: highest priority, then earliest arrival. int64 [num_running]."""
        return self._order

    def lowest_priority(self) -> int | None:
        """The priority of the row that is last in order, or None if nothing runs."""
        return -self._order_keys[-1][0] if self._order_keys else None

    def less_important_than(self, priority: int) -> Int64Array:
        """Rows of strictly lower priority, in order: they are the end of it. int64."""
        return self._order[bisect.bisect_left(self._order_keys, (1 - priority,)) :]

    def occupy(self, request: Request, chain: HashChain | None, num_cached: int) -> int:
        """Gives the request a row, with its first `num_cached` tokens computed and no block yet."""
        row = self._free.pop()
        known = request.num_known_tokens
        prompt = request.num_prompt_tokens
        self.tokens[row, :prompt] = request.prompt_token_ids
        self.tokens[row, prompt:known] = request.output_token_ids
        self.num_tokens[row] = self.num_confirmed[row] = self.num_initial[row] = known
        self.num_computed[row] = num_cached
        self.next_full[row] = (known // self.spec.block_size + 1) * self.spec.block_size
        self.num_prompt[row] = prompt
        self.num_charged[row] = prompt + request.num_charged_outputs
        self._open_account(row, request)
        self.limit[row], self.last[row] = request.limit, request.limit - 1
        self.min_total[row] = prompt + request.sampling.min_tokens
        self.num_blocks[row] = self.capacity[row] = self.first_block[row] = self.last_step[row] = 0
        self.handle[row], self.router_id[row] = request.handle, request.router_id
        self._set_stop_token_ids(row, request.sampling.stop_token_ids)
        self.prompt_logprobs[row] = not request.reads_prefix_cache
        self.num_prompt_logprobs += not request.reads_prefix_cache
        self.requests[row], self.chains[row] = request, chain
        self.version += 1
        key = order_key(request)
        place = bisect.bisect(self._order_keys, key)
        self._order_keys.insert(place, key)
        self._order = np.concatenate((self._order[:place], [row], self._order[place:]))
        return row

    def vacate(self, row: int) -> Request:
        """Takes the request out, its confirmed tokens with it. The row may be occupied again in the same plan."""
        request = self.requests[row]
        if request is None:
            raise RuntimeError(f"row {row} is free already")
        confirmed = self.tokens[row, self.num_prompt[row] : self.num_confirmed[row]]
        request.output_token_ids = confirmed.copy()
        request.num_charged_outputs = int(self.num_charged[row] - self.num_prompt[row])
        self._close_account(request)
        self.num_prompt_logprobs -= int(self.prompt_logprobs[row])
        self.requests[row] = self.chains[row] = None
        self.num_tokens[row] = self.num_computed[row] = self.last[row] = 0  # a free row wants nothing
        self.generation[row] += 1
        self.version += 1
        self._free.append(row)
        place = bisect.bisect_left(self._order_keys, order_key(request))
        del self._order_keys[place]
        self._order = np.concatenate((self._order[:place], self._order[place + 1 :]))
        return request

    def owned_blocks(self, row: int) -> Int64Array:
        """The blocks that the row holds, in the order of its table."""
        return self.block_table[row, self.first_block[row] : self.num_blocks[row]].astype(np.int64)

    def append_blocks(self, rows: Int64Array, counts: Int64Array, blocks: Int64Array) -> Int64Array:
        """Appends `counts[i]`, at least one, of `blocks` to the table of `rows[i]`; gives the row of each block."""
        length = self.num_blocks[rows]
        if blocks.size == rows.size:
            owner = rows
            self.block_table[owner, length] = blocks
        else:
            owner = np.repeat(rows, counts)
            start = np.repeat(counts.cumsum() - counts - length, counts)
            self.block_table[owner, np.arange(owner.size) - start] = blocks
        self._set_num_blocks(rows, length + counts)
        return owner

    def set_blocks(self, row: int, first: int, blocks: Int32Array) -> None:
        """The table of a row that has just been occupied; blocks before `first` are dead."""
        self.block_table[row, : blocks.size] = blocks
        self.first_block[row] = first
        self._set_num_blocks(row, blocks.size)

    def _set_num_blocks(self, rows: Int64Array | int, counts: Int64Array | int) -> None:
        self.num_blocks[rows] = counts
        self.capacity[rows] = counts * self.spec.block_size

    def take_uncharged(self) -> list[tuple[Request, int]]:
        """Outputs that came since their tenants were last charged: one request of each account that has some, and how many."""
        order = self._order
        due = self.num_confirmed[order] - self.num_charged[order]
        if np.count_nonzero(due) == 0:
            return []
        self.num_charged[order] = self.num_confirmed[order]
        accounts = self.account[order]
        totals = np.bincount(accounts, due).astype(np.int64).tolist()
        one_row = np.empty(len(totals), np.int64)
        one_row[accounts] = order
        found = []
        for account, _ in self._accounts.values():
            request = self.requests[one_row[account]]
            if totals[account] and request is not None:
                found.append((request, totals[account]))
        return found

    def _open_account(self, row: int, request: Request) -> None:
        account = self._accounts.get((request.priority, request.tenant))
        if account is None:
            account = self._accounts[request.priority, request.tenant] = [self._free_accounts.pop(), 0]
        account[1] += 1
        self.account[row] = account[0]

    def _close_account(self, request: Request) -> None:
        account = self._accounts[request.priority, request.tenant]
        account[1] -= 1
        if not account[1]:
            del self._accounts[request.priority, request.tenant]
            self._free_accounts.append(account[0])

    def _set_stop_token_ids(self, row: int, token_ids: tuple[int, ...]) -> None:
        length = self.stop_token_ids.shape[0]
        if len(token_ids) > length:
            while length < len(token_ids):
                length *= 2
            longer = np.full((length, len(self.requests)), NO_TOKEN, np.int32)
            longer[: self.stop_token_ids.shape[0]] = self.stop_token_ids
            self.stop_token_ids = longer
        self.stop_token_ids[:, row] = NO_TOKEN
        self.stop_token_ids[: len(token_ids), row] = token_ids
