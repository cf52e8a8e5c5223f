"""Defects to sow: a simulation that does not find these would not find others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from octavo.v1 import scheduler_pb2

from router.request import Request
from router.session import RouterSession
from scheduler.core import Reason, Scheduler, planner
from scheduler.core.rows import Rows
from scheduler.core.state import SchedulerState
from worker.grammar.matcher import RowMatcher
from worker.grammar.rows import ConstrainedRows
from worker.plan_codec import encode_output
from worker.session import WorkerSession

_router_receive = RouterSession.receive
_worker_message = WorkerSession.on_message
_submission = Request.submission
_new_matcher = RowMatcher.__init__
_apply_rows = ConstrainedRows.apply
_schedule_running = planner.schedule_running
_share_budget = planner.share_budget


def _late_output(self: WorkerSession, epoch: int, output: Any, now: float) -> scheduler_pb2.EnlistRequest | None:
    """A step of an earlier stream is reported as if it belonged to this one."""
    if self.epoch == 0:
        return None
    self._executing.pop(output.step_id, None)
    self._spoke_at = now
    return scheduler_pb2.EnlistRequest(epoch=self.epoch, result=encode_output(self.epoch, output))


def _any_plan(self: WorkerSession, message: scheduler_pb2.EnlistResponse, now: float) -> Any:
    """A message of an earlier stream is taken for one of this."""
    if self.epoch:
        message.epoch = self.epoch
        if message.HasField("plan"):
            message.plan.epoch = self.epoch
    return _worker_message(self, message, now)


def _any_tokens(self: RouterSession, address: str, message: scheduler_pb2.AttachResponse, now: float) -> None:
    """A message of an earlier stream is taken for one of this."""
    link = self._links.by_address.get(address)
    if link is not None and link.attached:
        message.epoch = link.epoch
    _router_receive(self, address, message, now)


def _no_index_check(self: RouterSession, link: Any, entry: Any, now: float) -> None:
    """Whatever comes is taken as the next tokens."""
    sequence = link.running.get(entry.handle)
    if sequence is None:
        return
    sequence.tries = 0
    sequence.output.append(entry.token_ids)
    if entry.finish_reason:
        sequence.output.end(entry.finish_reason)
        self._homes.release(link, sequence)
    self._changed[sequence.request] = None
    if sequence.output.finish_reason:
        self._done(sequence, now)


def _no_free_on_cancel(self: Scheduler, key: Any, now: float) -> bool:
    """A cancelled request goes on."""
    return True


def _forgetful(self: Request, sequence: Any, now: float) -> scheduler_pb2.Submit:
    """A resubmission starts from the beginning."""
    submit = _submission(self, sequence, now)
    submit.ClearField("output_token_ids")
    return submit


def _blame_all(self: SchedulerState, requests: list[Any], lost: int) -> None:
    """Everyone in a failed step is guilty."""
    for request in requests:
        request.failures_alone += 1
        if request.failures_alone >= self.settings.max_failures_alone:
            self.fail(request, Reason.POISON, "was there")


def _is_forgotten(rows: Rows, row: int) -> bool:
    """Some rows are not planned any more after a few tokens."""
    request = rows.requests[row]
    submit = request.payload if request is not None else None
    first = isinstance(submit, scheduler_pb2.Submit) and submit.attempt == 0 and submit.handle % 3 == 1
    return first and bool(rows.num_tokens[row] > rows.num_initial[row] + 3)


def _schedules_not_all(state: SchedulerState, worker: Any, batch: Any) -> None:
    def share_budget(want: Any, order: Any, budget: int) -> Any:
        chosen, counts = _share_budget(want, order, budget)
        kept = np.array([not _is_forgotten(worker.rows, row) for row in chosen.tolist()], np.bool_)
        return chosen[kept], counts[kept]

    with _patched((planner, "share_budget", share_budget)):
        _schedule_running(state, worker, batch)


def _no_replay(self: RowMatcher, start: Any, ends: Any, outputs: Any) -> None:
    """A request that goes on elsewhere begins its grammar anew."""
    _new_matcher(self, start, ends, ())
    self._num_outputs = len(outputs)


def _keeps_matchers(self: ConstrainedRows, step: Any) -> Any:
    """Whoever comes into a row follows the grammar of who was there before."""
    before = dict(self._rows)
    found = _apply_rows(self, step)
    for row, constrained in before.items():
        if row in self._rows and self._rows[row] is not constrained:
            self._rows[row].matcher = constrained.matcher
    return found


@contextmanager
def _patched(*changes: tuple[Any, str, object]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


_FENCING = (
    (WorkerSession, "on_output", _late_output),
    (WorkerSession, "on_message", _any_plan),
    (RouterSession, "receive", _any_tokens),
)
FORGETS_ROWS = "rows are forgotten"
_INDEX = (RouterSession, "_entry", _no_index_check)

MUTANTS: dict[str, Callable[[], Any]] = {
    "no fencing of late steps": lambda: _patched(_FENCING[0]),
    "no fencing of late plans": lambda: _patched(_FENCING[1]),
    "no fencing of late tokens, no index check": lambda: _patched(_FENCING[2], _INDEX),
    "no index check, forgetful router": lambda: _patched(_INDEX, (Request, "submission", _forgetful)),
    "no halving": lambda: _patched((SchedulerState, "_suspect", _blame_all)),
    FORGETS_ROWS: lambda: _patched((planner, "schedule_running", _schedules_not_all)),
    "no free on cancel": lambda: _patched((Scheduler, "cancel", _no_free_on_cancel)),
    "no replay of a grammar": lambda: _patched((RowMatcher, "__init__", _no_replay)),
    "a grammar outlives its row": lambda: _patched((ConstrainedRows, "apply", _keeps_matchers)),
}
"""Name to a context in which the defect is there. A forgetful router alone is no defect: the index check makes up for it."""
