"""Where a process stands, as text for its log: the stack of every thread, and what every asyncio task waits for.

May be called from any thread, also while the event loop is stuck. Names and line numbers only: no values, so no prompt text.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections import Counter
from types import FrameType
from typing import Any

_MAX_CHARACTERS = 100_000
_MAX_LINES = 100


def thread_stacks() -> str:
    """The Python stack of every thread, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        stack = "".join(traceback.format_stack(frame))
        parts.append(f"thread {names.get(ident, ident)}:\n{stack}")
    return "\n".join(parts)[:_MAX_CHARACTERS]


def task_stacks(loop: asyncio.AbstractEventLoop) -> str:
    """What the tasks of a loop wait for, tasks that wait at the same place in one line: `3 × Handler.serve at service.py:120`."""
    tasks = asyncio.all_tasks(loop)
    places = Counter(_place(task) for task in tasks)
    lines = [f"  {count} × {place}" for place, count in places.most_common(_MAX_LINES)]
    if len(places) > _MAX_LINES:
        lines.append(f"  and {len(places) - _MAX_LINES} places more")
    return "\n".join([f"{len(tasks)} asyncio tasks:", *lines])


def all_stacks(loop: asyncio.AbstractEventLoop) -> str:
    """Both."""
    return f"{thread_stacks()}\n{task_stacks(loop)}"


def _place(task: asyncio.Task[Any]) -> str:
    coroutine: Any = task.get_coro()
    name = getattr(coroutine, "__qualname__", type(coroutine).__name__)
    frame = _innermost(coroutine)
    return name if frame is None else f"{name} at {frame.f_code.co_filename}:{frame.f_lineno}"


def _innermost(coroutine: Any) -> FrameType | None:
    """The frame that waits: down the chain of coroutines and generators that await one another."""
    frame: FrameType | None = None
    while coroutine is not None:
        mine = next((f for name in _FRAMES if (f := getattr(coroutine, name, None)) is not None), None)
        if mine is None:
            break
        frame = mine
        coroutine = next((c for name in _AWAITED if (c := getattr(coroutine, name, None)) is not None), None)
    return frame


_FRAMES = ("cr_frame", "gi_frame", "ag_frame")
_AWAITED = ("cr_await", "gi_yieldfrom", "ag_await")
